"""The notebooks in examples/ run, show what they say, and are committed as a run leaves them."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest

from documents import ROOT, script

nbformat = pytest.importorskip("nbformat")
pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")
pytest.importorskip("mlxtend")

FOLDER = ROOT / "examples" / "notebooks"
NAMES = sorted(path.stem for path in FOLDER.glob("*.ipynb"))
NUMBER = r"-?\d+(?:\.\d+)?"
ABSOLUTE = re.compile(r"(?:^|[\s\"'(=])(?:/[\w.~-]+){2,}|\b[A-Z]:\\\w", re.M)


def command() -> ModuleType:
    """examples/notebooks/execute.py."""
    return script("examples/notebooks/execute.py")


def committed(name: str) -> Any:
    return nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)


def outputs(notebook: Any) -> list[Any]:
    return [output for cell in notebook.cells for output in cell.get("outputs", [])]


def printed(notebook: Any, stream: str = "stdout") -> str:
    return "".join(output.text for output in outputs(notebook) if output.get("name") == stream)


def rows(text: str) -> dict[str, list[float]]:
    """The numbers of each line `name: 1.0, 2.0`, by its name; the last line of a name counts."""
    found = {}
    for line in text.splitlines():
        name, colon, rest = line.partition(":")
        if colon:
            found[name] = [float(number) for number in re.findall(NUMBER, rest)]
    return found


def check_start(text: str) -> None:
    errors = {
        name: [float(error) for error in re.findall(r"(\d\.\d+) \+-", rest)]
        for name, rest in re.findall(r"^(\S.{23})(.*\+-.*)$", text, re.M)
    }
    errors = {name.strip(): values for name, values in errors.items()}
    for layer in (0, 1):
        assert errors["K-FOC"][layer] < errors["K-FAC"][layer] < errors["diagonal"][layer]
        assert errors["EK-FOC"][layer] < errors["K-FOC"][layer] + 0.01
        assert errors["K-FOC, rank 3"][layer] < errors["K-FOC"][layer]
    certified = re.findall(rf"certified ({NUMBER}) \+- ({NUMBER}), true ({NUMBER})", text)
    assert len(certified) == 2
    for error, deviation, truth in certified:
        assert abs(float(error) - float(truth)) < 4 * float(deviation)


def check_optimizer(text: str) -> None:
    reached = {name: int(step) for name, step in re.findall(r"(\S+): step (\d+)", text)}
    assert reached["K-FOC"] < reached["AdamW"]
    assert reached["K-FAC"] < reached["AdamW"]


def check_laplace(text: str) -> None:
    regression, digits = text.split("new observations")
    evidence = {name: values[-1] for name, values in rows(regression).items() if len(values) == 3}
    assert evidence["exact blocks"] > evidence["K-FOC"] > evidence["diagonal"]
    for name in ("diagonal", "K-FAC", "K-FOC", "exact blocks"):
        inside, deviation, inside_gap, deviation_gap = rows(digits)[name]
        assert min(inside, inside_gap) > 90
        assert deviation_gap > 1.2 * deviation
    scores = {name.split()[-1]: values for name, values in rows(digits).items()}
    assert scores["evidence"][0] > scores["alone"][0]
    assert scores["digits"][0] < 1.05 * scores["alone"][0]


def check_continual(text: str) -> None:
    table = text.split("test accuracy, %")[1]
    means = {line[:16].strip(): float(line.split()[-1]) for line in table.splitlines()[1:]}
    assert means.keys() == {"no penalty", "diagonal (EWC)", "K-FAC", "K-FOC"}
    assert all(means[name] > means["no penalty"] + 5 for name in set(means) - {"no penalty"})


def check_influence(text: str) -> None:
    harmful, correlations = text.split("correlation of")
    assert rows(harmful)["K-FOC"][0] > 30  # 8% by chance
    assert rows(correlations)["K-FOC"][0] > 0.4


CHECKS: dict[str, Callable[[str], None]] = {
    "start": check_start,
    "optimizer": check_optimizer,
    "laplace": check_laplace,
    "continual": check_continual,
    "influence": check_influence,
}


def test_every_notebook_has_a_check() -> None:
    assert set(NAMES) == set(CHECKS)


@pytest.mark.parametrize("name", NAMES)
def test_notebook_runs(name: str) -> None:
    path = FOLDER / f"{name}.ipynb"
    before = path.read_bytes()
    CHECKS[name](printed(command().executed(path)))
    assert path.read_bytes() == before


@pytest.mark.parametrize("name", NAMES)
def test_committed_outputs(name: str) -> None:
    notebook = committed(name)
    nbformat.validate(notebook)
    CHECKS[name](printed(notebook))
    assert not printed(notebook, "stderr")
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    pictures = [output.data["image/png"] for output in outputs(notebook) if "data" in output]
    assert all(len(picture) < 80_000 for picture in pictures)  # base64: 60,000 bytes
    again = command().cleaned(committed(name))
    assert again == notebook, "run python examples/notebooks/execute.py"
    texts = [cell.source for cell in notebook.cells] + [printed(notebook)]
    assert not [found for text in texts for found in ABSOLUTE.findall(text)]


def test_absolute_paths_are_found() -> None:
    assert ABSOLUTE.search('load("/home/someone/digits.csv")')
    assert ABSOLUTE.search("in C:\\digits")
    assert not ABSOLUTE.search("see [training](../../docs/training.md), 1 / 2, and/or")


@pytest.mark.parametrize("arguments", [("check",), ("format", "--check")], ids=lambda a: a[0])
def test_ruff_reads_the_notebooks(arguments: tuple[str, ...]) -> None:
    pytest.importorskip("ruff")
    if not (ROOT / "src").exists():
        pytest.skip("without src/, ruff takes kfoc for a package of others and sorts it elsewhere")
    ruff = [sys.executable, "-m", "ruff", *arguments, "--no-cache"]
    done = subprocess.run([*ruff, str(FOLDER)], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    listed = [sys.executable, "-m", "ruff", "check", "--show-files", str(FOLDER)]
    files = subprocess.run(listed, capture_output=True, text=True, cwd=ROOT).stdout
    assert all(f"{name}.ipynb" in files for name in NAMES)
