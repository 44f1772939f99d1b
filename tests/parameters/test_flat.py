"""Curvatures as linear operators of SciPy, and the order of their parameters."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from torch.nn.utils import parameters_to_vector

import kfoc
from curvatures import block, curvature
from kfoc.blocks import KINDS
from models import batches, convolutional, images

linalg = pytest.importorskip("scipy.sparse.linalg")


def columns(found: kfoc.Curvature) -> torch.Tensor:
    """F in the order of `flatten`, from the blocks' dense matrices and an order of their own."""
    order, start = [], 0
    for layout in found.layouts.values():
        o, i = layout.shape
        places = torch.arange(start, start + o * i).view(o, i)
        order += [places[:, :-1].flatten(), places[:, -1]]
        start += o * i
    at = torch.cat(order)
    return torch.block_diag(*[block.to_dense() for block in found.values()])[at][:, at]


@pytest.fixture
def every_kind() -> kfoc.Curvature:
    return curvature(*[block(kind) for kind in KINDS])


def test_operator_is_f(every_kind: kfoc.Curvature) -> None:
    operator, dense = every_kind.to_linear_operator(), columns(every_kind).numpy()
    assert operator.dtype == np.float64
    assert operator.shape == dense.shape
    vectors = np.random.default_rng(0).standard_normal((len(dense), 3))
    for product in (operator.matmat, operator.rmatmat):
        np.testing.assert_allclose(product(vectors), dense @ vectors, rtol=1e-10, atol=1e-12)
    for product in (operator.matvec, operator.rmatvec):
        np.testing.assert_allclose(product(vectors[:, 0]), dense @ vectors[:, 0], rtol=1e-10)
    reversed_view = vectors[::-1, 0]
    reversed_view.flags.writeable = False
    np.testing.assert_allclose(operator @ reversed_view, dense @ reversed_view, rtol=1e-10)


def test_damped_operators_are_powers() -> None:
    kinds = [kind for kind in KINDS if kind != "LowRankBlock"]
    found = curvature(*[block(kind) for kind in kinds])
    damped = found.damped(0.3, scale=2.0)
    matrix = 2 * columns(found) + 0.3 * torch.eye(len(columns(found)))
    values, vectors = torch.linalg.eigh(matrix)
    v = np.random.default_rng(0).standard_normal(len(matrix))
    for exponent in (1, 0.5, -0.5, -1):
        expected = ((vectors * values**exponent) @ vectors.mT).numpy() @ v
        operator = damped.to_linear_operator(exponent)
        np.testing.assert_allclose(operator @ v, expected, rtol=1e-9)
    np.testing.assert_allclose(damped.to_linear_operator() @ (matrix.numpy() @ v), v, rtol=1e-8)
    with pytest.raises(ValueError, match="exponent must be one of"):
        damped.to_linear_operator(2)


def test_flatten_is_the_order_of_the_models_parameters() -> None:
    model = convolutional()
    found = kfoc.fit(model, batches(*images(6), 3))
    vector = {name: p.detach() for name, p in model.named_parameters()}
    flat = found.flatten(vector)
    assert torch.equal(flat, parameters_to_vector(model.parameters()).detach())
    back = found.damped(1.0).unflatten(torch.stack([flat, 2 * flat]))
    assert all(torch.equal(back[name][1], 2 * vector[name]) for name in vector)
    assert torch.equal(found.damped(1.0).flatten(back)[0], flat)
    with pytest.raises(ValueError, match="must end in the 487 parameters"):
        found.unflatten(flat[1:])
    with pytest.raises(ValueError, match=r"lacks 0\.weight"):
        found.flatten({name: v for name, v in vector.items() if name != "0.weight"})


def test_eigsh_finds_the_largest_eigenvalues(every_kind: kfoc.Curvature) -> None:
    found = linalg.eigsh(every_kind.to_linear_operator(), k=3, return_eigenvectors=False)
    expected = torch.linalg.eigvalsh(columns(every_kind))[-3:].numpy()
    np.testing.assert_allclose(np.sort(found), expected, rtol=1e-8)


def test_cg_with_the_inverse_as_preconditioner() -> None:
    model, data = convolutional(), batches(*images(60), 20)
    found = kfoc.fit(model, data, fisher="exact")
    exact = kfoc.fit(model, data, fisher="exact", estimator=kfoc.BlockDiagonal())
    system = exact.damped(1e-3).to_linear_operator(1)
    right = np.random.default_rng(0).standard_normal(system.shape[0])
    counts = []
    for preconditioner in (None, found.damped(1e-3).to_linear_operator()):
        steps: list[int] = []
        solution, failed = linalg.cg(
            system, right, rtol=1e-10, M=preconditioner, callback=lambda _, s=steps: s.append(1)
        )
        assert not failed
        expected = exact.flatten(exact.solve(exact.unflatten(torch.tensor(right)), 1e-3))
        np.testing.assert_allclose(solution, expected.numpy(), rtol=1e-5, atol=1e-6)
        counts.append(len(steps))
    assert counts[1] < counts[0]


def test_float32_and_complex() -> None:
    found = kfoc.fit(convolutional(torch.float32), batches(*images(6, torch.float32), 3))
    operator = found.to(dtype=torch.bfloat16).to_linear_operator()
    assert operator.dtype == np.float32
    assert (operator @ np.ones(operator.shape[1])).dtype == np.float32
    with pytest.raises(ValueError, match="real and imaginary"):
        operator @ np.ones(operator.shape[1], dtype=complex)


def test_without_scipy(every_kind: kfoc.Curvature, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "scipy.sparse.linalg", None)
    with pytest.raises(ImportError, match="pip install scipy"):
        every_kind.to_linear_operator()
