"""A Kronecker factor, (n, n), or (n,) where it is diagonal: what the kinds of block share."""

from __future__ import annotations

from torch import Tensor

from kfoc.linalg.eigen import eigh
from kfoc.linalg.scaling import wide


def diagonal(factor: Tensor) -> Tensor:
    """(n,)."""
    return factor.diagonal() if factor.ndim == 2 else factor


def times_right(vectors: Tensor, factor: Tensor) -> Tensor:
    """`vectors @ factor^T`, (..., n)."""
    return vectors @ factor.mT if factor.ndim == 2 else vectors * factor


def inner(first: Tensor, second: Tensor) -> Tensor:
    """The Frobenius inner product, a scalar."""
    if first.ndim != second.ndim:
        first, second = diagonal(first), diagonal(second)
    return (first * second).sum()


def diagonal_in(factor: Tensor, vectors: Tensor | None) -> Tensor:
    """`w^T factor w` for every column w of `vectors` (n, p); (p,)."""
    if vectors is None:
        return diagonal(factor)
    if factor.ndim == 1:
        return factor @ vectors.square()
    return ((factor @ vectors) * vectors).sum(0)


def eigen(factor: Tensor, what: str) -> tuple[Tensor, Tensor | None]:
    """Eigenvalues and eigenvectors of a positive semi-definite factor; None is the identity."""
    if factor.ndim == 2:
        return eigh(factor, what)
    factor = wide(factor)
    if not factor.isfinite().all():
        raise ValueError(f"{what} has values that are not finite")
    if factor.numel() and factor.min() < 0:
        raise ValueError(f"{what} is not positive semi-definite: it has {factor.min().item():.3g}")
    return factor, None
