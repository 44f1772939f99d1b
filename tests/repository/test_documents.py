"""The code in docs/ and in examples/ runs as it stands."""

from __future__ import annotations

import re
import runpy
import sys

import pytest
import torch

import layer_table
from documents import ROOT, executed


def test_using_a_curvature(capsys: pytest.CaptureFixture[str]) -> None:
    torch.set_default_dtype(torch.float32)
    scope = executed("docs/curvature.md")
    assert capsys.readouterr().out.count("+-") == 10
    assert scope["half"]["0"].left.dtype == torch.float64


def test_errors_of_solves_are_those_that_were_measured() -> None:
    measured = (ROOT / "benchmarks" / "results" / "solves.md").read_text()
    table = measured.split("### Errors")[1].strip()
    assert table in (ROOT / "docs" / "curvature.md").read_text(), "put it into docs/curvature.md"


def test_models_whose_factors_exceed_memory(capsys: pytest.CaptureFixture[str]) -> None:
    torch.set_default_dtype(torch.float32)
    text = (ROOT / "docs" / "memory.md").read_text()
    scope = executed("docs/memory.md")
    assert capsys.readouterr().out == "index.json\n"
    factors = sum(
        tensor.nbytes for block in scope["curvature"].values() for tensor in block.tensors()
    )
    assert f"{factors / 2**17:.1f} times" in text
    measured = (ROOT / "benchmarks" / "results" / "layerwise.md").read_text()
    assert measured in text, "put benchmarks/results/layerwise.md into docs/memory.md"


def test_compare_estimators(capsys: pytest.CaptureFixture[str]) -> None:
    torch.set_default_dtype(torch.float32)
    runpy.run_path(str(ROOT / "examples" / "compare_estimators.py"), run_name="__main__")
    lines = capsys.readouterr().out.splitlines()[1:]
    numbers = r"(\d\.\d+) \+- \d\.\d+"
    errors = {line[:24].strip(): [float(e) for e in re.findall(numbers, line)] for line in lines}
    assert len(errors) == 6
    for base, better in (("K-FAC", "EKFAC"), ("K-FOC", "EK-FOC"), ("K-FOC", "K-FOC, rank 3")):
        assert all(e < b for e, b in zip(errors[better], errors[base], strict=True))


def test_the_table_of_layers_is_that_of_the_tests() -> None:
    assert layer_table.PAGE.read_text() == layer_table.page(), "run python tests/layer_table.py"


@pytest.mark.filterwarnings("ignore")  # of the libraries that it imports
def test_interop(capsys: pytest.CaptureFixture[str]) -> None:
    torch.set_default_dtype(torch.float32)
    runpy.run_path(str(ROOT / "examples" / "interop.py"), run_name="__main__")
    lines = capsys.readouterr().out.splitlines()
    left_out = sum("left out: " in line for line in lines)
    steps = [int(line.split()[0]) for line in lines if "steps of" in line]
    assert left_out or len(lines) == 6
    assert not steps or steps[1] < 0.8 * steps[0]
    marginals = [float(line.split()[-1]) for line in lines if "marginal likelihood" in line]
    assert len(marginals) in (0, 2)


@pytest.mark.filterwarnings("ignore")
def test_interop_document() -> None:
    torch.set_default_dtype(torch.float32)
    try:
        executed("docs/interop.md")
    except ImportError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("name", ["training.md", "continual.md"])
def test_training_with_a_curvature(name: str) -> None:
    torch.set_default_dtype(torch.float32)
    losses = executed(f"docs/{name}")["losses"]
    assert losses[-1] < 0.7 * losses[0]


def test_consolidation(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_default_dtype(torch.float32)
    monkeypatch.setattr(sys, "argv", ["consolidation.py", "--quick"])
    runpy.run_path(str(ROOT / "examples" / "consolidation.py"), run_name="__main__")
    rows = [line.split("|")[1:4] for line in capsys.readouterr().out.splitlines()[2:]]
    forgetting = {name.strip(): float(value) for name, _, value in rows}
    assert len(forgetting) == 7
    assert all(forgetting[name] < forgetting["no penalty"] for name in ("K-FAC", "K-FOC", "EK-FOC"))


def test_natural_gradient(capsys: pytest.CaptureFixture[str]) -> None:
    torch.set_default_dtype(torch.float32)
    runpy.run_path(str(ROOT / "examples" / "natural_gradient.py"), run_name="__main__")
    lines = [line.split() for line in capsys.readouterr().out.splitlines()[1:]]
    last = {name: float(values[-1]) for name, *values in lines}
    assert last["K-FOC"] < 0.5 * last["AdamW"]
    assert last["K-FAC"] < 0.5 * last["AdamW"]
