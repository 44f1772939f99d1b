"""Damped blocks that are Kronecker products themselves: solved with by Cholesky, not eigenvectors.

A Cholesky factor takes a small part of what an eigendecomposition does, but is of one damping, and
has no roots. So it serves solves and determinants alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from kfoc.blocks import factors
from kfoc.blocks.damped import DampedBlock, DampedSpectrum, Damping
from kfoc.blocks.decomposed import DecomposedBlock
from kfoc.linalg.scaling import finite, wide


def damped_factors(left: Tensor, right: Tensor, damping: Damping) -> tuple[Tensor, Tensor] | None:
    """Two factors whose Kronecker product is `scale * kron(left, right)`, damped.

    Of factored Tikhonov damping (see `Damping`), or where a factor is but a number.

    Returns:
        Copies, in float32 at least; None where the damped matrix is no product.
    """
    left, right = wide(left), wide(right)
    if damping.method == "pi":
        shifts = damping.shifts(factors.diagonal(left), factors.diagonal(right))
        scale = math.sqrt(damping.scale)
        return _shifted(left * scale, shifts[0]), _shifted(right * scale, shifts[1])
    if left.numel() == 1:
        scaled = right * (left.squeeze() * damping.scale)
        return torch.ones_like(left), _shifted(scaled, damping.damping)
    if right.numel() == 1:
        scaled = left * (right.squeeze() * damping.scale)
        return _shifted(scaled, damping.damping), torch.ones_like(right)
    return None


def triangle(factor: Tensor) -> Tensor | None:
    """The lower Cholesky factor (n, n) of a factor; the root (n,) of a diagonal one.

    None where the factor is not positive definite, to rounding.
    """
    if factor.ndim == 1:
        found = factor.sqrt()
        return found if bool((factor > 0).all() & found.isfinite().all()) else None
    found, failed = torch.linalg.cholesky_ex(factor)
    # It reads the lower triangle alone.
    return found if not failed.item() and finite(factor) else None


@dataclass(frozen=True)
class DampedProduct(DampedBlock):
    """`kron(left left^T, right right^T)`, of triangles (o, o) and (i, i); (n,) for diagonal ones.

    Roots, draws and eigenvalues take the eigendecomposition of F, which then stays with its block,
    and so do other dampings: they raise where the block has been written to since.

    Attributes:
        block: F.
        marks: of the block as it was.
        damping: of F.
    """

    block: DecomposedBlock
    marks: list[Tensor]
    damping: Damping
    left: Tensor
    right: Tensor

    @staticmethod
    def of(
        block: DecomposedBlock, left: Tensor, right: Tensor, damping: Damping
    ) -> DampedProduct | None:
        """Of F = `kron(left, right)`, or None: it is no product, or not sure to be definite."""
        if not damping.damping or any((factors.diagonal(f) < 0).any() for f in (left, right)):
            return None
        damped = damped_factors(left, right, damping)
        if damped is None:
            return None
        triangles = triangle(damped[0]), triangle(damped[1])
        if triangles[0] is None or triangles[1] is None:
            return None
        return DampedProduct(block, block.marks(), damping, triangles[0], triangles[1])

    @property
    def dtype(self) -> torch.dtype:
        return self.left.dtype

    @property
    def shape(self) -> tuple[int, int]:
        return self.left.shape[0], self.right.shape[0]

    @property
    def device(self) -> torch.device:
        return self.left.device

    def power(self, vectors: Tensor, exponent: float) -> Tensor:
        if abs(exponent) != 1:
            return self._spectral.power(vectors, exponent)
        operator = _times if exponent == 1 else _solved
        columns = operator(self.left, vectors.movedim(-2, 0).flatten(1))
        rest = columns.unflatten(1, (*vectors.shape[:-2], -1)).movedim(0, -2)
        rows = operator(self.right, rest.flatten(0, -2).mT)
        return rows.mT.reshape(vectors.shape)

    def logdet(self) -> float:
        o, i = self.shape
        left, right = (
            2 * factors.diagonal(f).double().log().sum().item() for f in (self.left, self.right)
        )
        return i * left + o * right

    def inverse_diagonal(self) -> Tensor:
        left, right = (
            f**-2 if f.ndim == 1 else torch.cholesky_inverse(f).diagonal()
            for f in (self.left, self.right)
        )
        return left[:, None] * right

    def eigenvalues(self) -> Tensor:
        return self._spectral.eigenvalues()

    def redamped(self, damping: Damping) -> DampedSpectrum:
        if not self.block.has(self.marks):
            raise ValueError("the block has been written to since it was damped: damp it again")
        return DampedSpectrum(self.block.spectrum(), damping)

    @property
    def _spectral(self) -> DampedSpectrum:
        return self.redamped(self.damping)


def _shifted(factor: Tensor, shift: float) -> Tensor:
    """A factor plus a multiple of the identity, in its place."""
    factors.diagonal(factor).add_(shift)
    return factor


def _times(factor: Tensor, columns: Tensor) -> Tensor:
    if factor.ndim == 1:
        return factor.square()[:, None] * columns
    return factor @ (factor.mT @ columns)


def _solved(factor: Tensor, columns: Tensor) -> Tensor:
    if factor.ndim == 1:
        return columns / factor.square()[:, None]
    return torch.cholesky_solve(columns, factor)
