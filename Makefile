# Both main targets make .venv themselves on a machine that has Python 3.11 and nothing else.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin

# Cases of each property test in a nightly run.
CASES ?= 2000

.PHONY: reproduce reproduce-full test nightly wheel lint setup benchmark study study-quick notebooks \
	docs dist clean

reproduce: $(VENV)/ready  ## the paper's two figures, quickly, into results-quick/
	$(BIN)/kfoc reproduce --quick --out results-quick

reproduce-full: $(VENV)/ready  ## the same on all data with ten seeds, into results/
	$(BIN)/kfoc reproduce --out results

test: $(VENV)/ready lint  ## lint, types, tests: files of them in two processes, of one thread each
	$(BIN)/python -m pytest -n 2 --dist loadfile

nightly: $(VENV)/ready  ## thousands of random cases of the property tests, other ones every time
	KFOC_PROFILE=nightly KFOC_CASES=$(CASES) $(BIN)/python -m pytest tests/test_properties.py

wheel:  ## the suite against the built wheel, outside the repository; TORCH=torch==2.6.0 for another
	sh tests/wheel.sh $(TORCH)

lint: $(VENV)/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

setup: $(VENV)/ready  ## .venv, with all that tests, linters and documentation need

$(VENV)/ready: pyproject.toml requirements-torch.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet -r requirements-torch.txt
	$(BIN)/pip install --quiet -e '.[test]' -c requirements-torch.txt
	touch $@

benchmark: $(VENV)/ready $(VENV)/peers
	$(BIN)/python benchmarks/run.py

study: $(VENV)/ready  ## does optimality matter? results, plots and tables, into results-study/
	$(BIN)/python study/run.py --out results-study

study-quick: $(VENV)/ready  ## the same, tiny, to see that all of it runs
	$(BIN)/python study/run.py --quick --out results-study-quick

$(VENV)/peers: $(VENV)/ready benchmarks/requirements-peers.txt
	$(BIN)/pip install --quiet --no-deps -r benchmarks/requirements-peers.txt
	touch $@

docs: $(VENV)/ready  ## the documentation, into site/; search needs a server: python -m http.server -d site
	$(BIN)/mkdocs build

notebooks: $(VENV)/ready  ## run examples/notebooks again, in place
	$(BIN)/python examples/notebooks/execute.py

dist: $(VENV)/ready $(VENV)/release  ## wheel and sdist, checked, into dist/; see RELEASING.md
	rm -rf dist
	$(BIN)/python -m build --outdir dist
	$(BIN)/python -m twine check --strict dist/*
	$(BIN)/python tests/release.py dist

$(VENV)/release: $(VENV)/ready
	$(BIN)/pip install --quiet 'build>=1.2' 'twine>=6'
	touch $@

clean:
	rm -rf $(VENV) results results-quick results-study results-study-quick site dist
