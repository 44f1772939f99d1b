"""The code in docs/curvature.md and in examples/ runs as it stands."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest
import torch

import layer_table

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


def test_the_table_of_layers_is_that_of_the_tests() -> None:
    assert layer_table.PAGE.read_text() == layer_table.page(), "run python tests/layer_table.py"
