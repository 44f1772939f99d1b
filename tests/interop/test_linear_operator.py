"""Blocks as operators of the linear_operator package."""

from __future__ import annotations

import importlib
import sys
import warnings

import pytest
import torch

import kfoc
from curvatures import block, curvature, vector
from kfoc.blocks import KINDS
from models import batches, images

with warnings.catch_warnings():  # of the package's own
    warnings.simplefilter("ignore")
    linear_operator = pytest.importorskip("linear_operator")
from kfoc.interop import linear_operator as interop


@pytest.mark.parametrize("kind", KINDS)
def test_operator_is_the_block(kind: str) -> None:
    each = block(kind)
    found = interop.to_linear_operator(each)
    assert isinstance(found, linear_operator.LinearOperator)
    dense = each.to_dense()
    torch.testing.assert_close(found.to_dense(), dense)
    vectors = torch.randn(len(dense), 2)
    torch.testing.assert_close(found @ vectors, dense @ vectors)


def test_the_structure_is_kept() -> None:
    names = {kind: type(interop.to_linear_operator(block(kind))).__name__ for kind in KINDS}
    assert names["KroneckerBlock"] == "KroneckerProductLinearOperator"
    assert names["GroupedBlock"] == "BlockDiagLinearOperator"


def test_vectors_by_layer_solve_as_the_curvature_does() -> None:
    model = torch.nn.Sequential(
        torch.nn.Conv2d(2, 4, 3, groups=2), torch.nn.Flatten(), torch.nn.Linear(144, 3)
    )
    found = kfoc.fit(model, batches(*images(20), 10))
    vectors = vector(found, 2)
    parts = interop.layer_vectors(found, vectors)
    products = {
        layer: (operator @ parts[layer].mT).mT
        for layer, operator in interop.to_linear_operators(found).items()
    }
    expected = found.matvec(vectors)
    for name, product in interop.parameter_tensors(found, products).items():
        torch.testing.assert_close(product, expected[name])
    damped = interop.to_linear_operators(found)["2"].add_diagonal(torch.tensor(0.1))
    solved = interop.parameter_tensors(found, {"2": damped.solve(parts["2"].mT).mT})
    expected = found.solve(vectors, 0.1)
    for name, solution in solved.items():
        torch.testing.assert_close(solution, expected[name])
    logdet = found["2"].damped(kfoc.blocks.Damping(0.1)).logdet()
    assert damped.logdet().item() == pytest.approx(logdet)


def test_kinds_without_an_operator() -> None:
    uneven = kfoc.GroupedBlock((block("DiagonalBlock"), block("DiagonalBlock")))
    with pytest.raises(ValueError, match="layer '0': only groups with Kronecker products"):
        interop.to_linear_operators(curvature(uneven))


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "linear_operator", None)
    monkeypatch.delitem(sys.modules, "kfoc.interop.linear_operator")
    with pytest.raises(ImportError, match="pip install linear_operator"):
        importlib.import_module("kfoc.interop.linear_operator")
