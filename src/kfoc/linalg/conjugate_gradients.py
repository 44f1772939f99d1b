"""Conjugate gradients on several right-hand sides, which share their directions and products."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

Operator = Callable[[Tensor], Tensor]  # on rows (r, n)


class Iterate(NamedTuple):
    """Where an iteration has come to.

    Attributes:
        solutions: (m, n), a row for each right-hand side.
        residuals: (m,), the norm of `b - A x` by that of b; 0 where b is.
        products: how often the matrix was applied, to all directions at once.
    """

    solutions: Tensor
    residuals: Tensor
    products: int


def conjugate_gradients(
    matrix: Operator,
    right: Tensor,
    precondition: Operator,
    *,
    rtol: float,
    max_products: int,
) -> Iterate:
    """Solve `A x = b` for all rows b of `right`, with a positive definite A.

    Block conjugate gradients (O'Leary 1980), whose directions are made orthonormal and left out
    where they depend on one another (as in Ji & Li 2017): every solution is sought among the
    directions of all, so that many right-hand sides take fewer products than one does. Of a
    single one they are preconditioned conjugate gradients. The residual is that of the recursion.

    Args:
        matrix: A times rows (r, n).
        right: (m, n).
        precondition: an approximation of the inverse of A, symmetric and positive definite, times
            rows (r, n).
        rtol: of the residuals; it ends when all have come to it.
        max_products: the limit.

    Raises:
        ValueError: A is not positive definite along a direction, or values are not finite.
    """
    norms = torch.linalg.vector_norm(right, dim=1, dtype=torch.float64).to(right)
    # Of norm 1 each: then one tolerance is for all, and no row is small beside another.
    residuals = right / torch.where(norms > 0, norms, 1)[:, None]
    left = residuals.norm(dim=1)
    solutions = torch.zeros_like(right)
    least = 8 * torch.finfo(right.dtype).eps  # under which rows are made of rounding
    if not (left > least).any():
        return Iterate(solutions, left, 0)
    directions, done = _basis(precondition(residuals[left > least])), 0
    while done < max_products and len(directions):
        images = matrix(directions)
        if not images.isfinite().all():
            raise ValueError("a product with the matrix has values that are not finite")
        factor = _cholesky(directions @ images.mT)
        steps = _solved(factor, directions @ residuals.mT)
        solutions += steps.mT @ directions
        residuals = residuals - steps.mT @ images
        left, done = residuals.norm(dim=1), done + 1
        if done == max_products or not (left > max(rtol, least)).any():
            break
        # Also of those that are within rtol: directions without theirs would not be conjugate to
        # the ones before, and the others take more products for it.
        ready = precondition(residuals[left > least])
        turns = _solved(factor, images @ ready.mT)
        directions = _basis(ready - turns.mT @ directions)
    return Iterate(solutions * norms[:, None], left, done)


def _basis(rows: Tensor) -> Tensor:
    """Orthonormal rows (r, n) that span what is large in rows (m, n), r <= m."""
    norms = rows.norm(dim=1, keepdim=True)
    rows = rows / torch.where(norms > 0, norms, 1)
    if len(rows) < 2:
        return rows[norms[:, 0] > 0]
    values, vectors = torch.linalg.eigh((rows @ rows.mT).double())
    kept = values > 32 * torch.finfo(rows.dtype).eps * values[-1]
    return (vectors[:, kept] / values[kept].sqrt()).mT.to(rows) @ rows


def _cholesky(products: Tensor) -> Tensor:
    products = products.double()
    factor, info = torch.linalg.cholesky_ex((products + products.mT) / 2)
    if info:
        raise ValueError(
            "conjugate gradients need a positive definite matrix, and met a direction along which "
            "it is not: more damping, or float64, may help"
        )
    return factor


def _solved(factor: Tensor, right: Tensor) -> Tensor:
    return torch.cholesky_solve(right.double(), factor).to(right)
