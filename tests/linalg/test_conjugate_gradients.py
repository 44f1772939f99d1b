"""Conjugate gradients against dense solves, and how many products they take."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kfoc.linalg.conjugate_gradients import conjugate_gradients


def matrix(size: int, condition: float) -> Tensor:
    basis = torch.linalg.qr(torch.randn(size, size))[0]
    return (basis * torch.logspace(0, torch.tensor(condition).log10().item(), size)) @ basis.mT


def solved(a: Tensor, right: Tensor, inverse: Tensor | None = None, **options):
    inverse = torch.eye(len(a)).to(a) if inverse is None else inverse
    options = {"rtol": 1e-10, "max_products": 200} | options
    return conjugate_gradients(lambda v: v @ a, right, lambda v: v @ inverse, **options)


@pytest.mark.parametrize("count", [1, 4, 30])
def test_solutions_are_those_of_dense_solves(count: int) -> None:
    a, right = matrix(30, 1e3), torch.randn(count, 30) * torch.logspace(-9, 9, count)[:, None]
    found = solved(a, right)
    expected = torch.linalg.solve(a, right.mT).mT
    scale = expected.norm(dim=1, keepdim=True)
    torch.testing.assert_close(found.solutions / scale, expected / scale, rtol=0, atol=1e-7)
    left = (right - found.solutions @ a).norm(dim=1) / right.norm(dim=1)
    assert (left <= 1e-9).all()
    torch.testing.assert_close(found.residuals, left, rtol=0, atol=1e-11)


def test_one_right_hand_side_takes_the_textbook_s_iterates() -> None:
    a, b, inverse = matrix(12, 50.0), torch.randn(12), matrix(12, 5.0).inverse()
    x, r = torch.zeros(12), b.clone()
    z = inverse @ r
    p = z.clone()
    for k in range(1, 7):
        step = (r @ z) / (p @ a @ p)
        x, before, r = x + step * p, r @ z, r - step * (a @ p)
        z = inverse @ r
        p = z + (r @ z) / before * p
        found = solved(a, b[None], inverse, rtol=0.0, max_products=k)
        assert found.products == k
        torch.testing.assert_close(found.solutions[0], x)


def test_many_right_hand_sides_share_their_products() -> None:
    a = matrix(60, 1e4)
    right = torch.randn(12, 60)
    alone = max(solved(a, b[None], rtol=1e-6).products for b in right)
    assert solved(a, right, rtol=1e-6).products <= 60 // 12 + 3 < alone / 4


def test_dependent_and_empty_right_hand_sides() -> None:
    a, b = matrix(20, 100.0), torch.randn(2, 20)
    right = torch.stack([b[0], b[1], torch.zeros(20), b[0] - 2 * b[1], 1e6 * b[0]])
    found = solved(a, right, rtol=1e-9)
    assert found.residuals[2] == 0
    assert (found.residuals <= 1e-9).all()
    torch.testing.assert_close(found.solutions, torch.linalg.solve(a, right.mT).mT)
    assert found.products == solved(a, b, rtol=1e-9).products
    for empty in (torch.zeros(3, 20), torch.zeros(0, 20)):
        found = solved(a, empty)
        assert found.products == 0
        assert torch.equal(found.solutions, empty)


def test_an_exact_preconditioner_takes_one_product() -> None:
    a, right = matrix(20, 1e4), torch.randn(3, 20)
    assert solved(a, right, a.inverse()).products == 1


def test_no_more_products_than_allowed_and_none_after_convergence() -> None:
    a, right = matrix(30, 1e4), torch.randn(2, 30)
    found = solved(a, right, max_products=3)
    assert found.products == 3
    left = (right - found.solutions @ a).norm(dim=1) / right.norm(dim=1)
    torch.testing.assert_close(found.residuals, left)
    # Without a tolerance it ends where rounding leaves nothing to do.
    assert solved(a, right, rtol=0.0).products < 100


def test_float32_tells_its_residual() -> None:
    a, right = matrix(50, 1e3), torch.randn(4, 50)
    found = solved(a.float(), right.float(), rtol=1e-4)
    assert found.solutions.dtype == torch.float32
    left = (right - found.solutions.double() @ a).norm(dim=1) / right.norm(dim=1)
    assert (left < 2e-4).all()


def test_matrices_that_are_not_positive_definite() -> None:
    a = torch.diag(torch.tensor([1.0, -1.0, 2.0]))
    with pytest.raises(ValueError, match="positive definite"):
        solved(a, torch.tensor([[0.1, 1.0, 0.1]]))
    with pytest.raises(ValueError, match="not finite"):
        solved(torch.eye(3) * float("nan"), torch.ones(1, 3))
