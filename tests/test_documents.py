"""The code in docs/ and in examples/ runs as it stands."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent


def test_using_a_curvature(capsys: pytest.CaptureFixture[str]) -> None:
    torch.set_default_dtype(torch.float32)
    text = (ROOT / "docs" / "curvature.md").read_text()
    scope: dict = {}
    for code in re.findall(r"```python\n(.*?)```", text, re.S):
        exec(code, scope)
    assert capsys.readouterr().out.count("+-") == 10
    assert scope["half"]["0"].left.dtype == torch.float64


def test_compare_estimators(capsys: pytest.CaptureFixture[str]) -> None:
    torch.set_default_dtype(torch.float32)
    runpy.run_path(str(ROOT / "examples" / "compare_estimators.py"), run_name="__main__")
    lines = capsys.readouterr().out.splitlines()[1:]
    numbers = r"(\d\.\d+) \+- \d\.\d+"
    errors = {line[:24].strip(): [float(e) for e in re.findall(numbers, line)] for line in lines}
    assert len(errors) == 6
    for base, better in (("K-FAC", "EKFAC"), ("K-FOC", "EK-FOC"), ("K-FOC", "K-FOC, rank 3")):
        assert all(e < b for e, b in zip(errors[better], errors[base], strict=True))


@pytest.mark.parametrize("name", ["training.md", "continual.md"])
def test_training_with_a_curvature(name: str) -> None:
    torch.set_default_dtype(torch.float32)
    scope: dict = {}
    for code in re.findall(r"```python\n(.*?)```", (ROOT / "docs" / name).read_text(), re.S):
        exec(code, scope)
    losses = scope["losses"]
    assert losses[-1] < 0.7 * losses[0]


def test_consolidation(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_default_dtype(torch.float32)
    monkeypatch.setattr(sys, "argv", ["consolidation.py", "--quick"])
    runpy.run_path(str(ROOT / "examples" / "consolidation.py"), run_name="__main__")
    rows = [line.split("|")[1:4] for line in capsys.readouterr().out.splitlines()[2:]]
    forgetting = {name.strip(): float(value) for name, _, value in rows}
    assert len(forgetting) == 7
    assert all(forgetting[name] < forgetting["no penalty"] for name in ("K-FAC", "K-FOC", "EK-FOC"))
