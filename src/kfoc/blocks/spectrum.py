"""Eigendecompositions that do not fail, and the bases that they give."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


def eigh(matrix: Tensor, what: str = "the block") -> tuple[Tensor, Tensor]:
    """Eigenvalues (n,), ascending, and eigenvectors (n, n) of a positive semi-definite matrix.

    In the matrix's dtype, but float32 at least; in float64 where that fails, as it can for nearly
    singular matrices in float32. Eigenvalues that are negative by rounding become zero.

    Args:
        what: the matrix's name in errors.

    Raises:
        ValueError: values that are not finite, or an eigenvalue that is negative beyond rounding.
    """
    values, vectors = symmetric_eigh(matrix, what)
    if not values.numel():
        return values, vectors
    low, high = values[0].item(), values[-1].abs().item()
    # Sums over many samples round by more than one product does: a few times n epsilons.
    tolerance = 8 * max(len(values), 64) * torch.finfo(matrix.dtype).eps
    if low < -tolerance * max(high, abs(low)):
        raise ValueError(
            f"{what} is not positive semi-definite: its eigenvalues go from {low:.3g} to {high:.3g}"
        )
    return values.clamp_min(0), vectors


def symmetric_eigh(matrix: Tensor, what: str) -> tuple[Tensor, Tensor]:
    """As `eigh`, of any symmetric matrix, with its eigenvalues as they are."""
    if not matrix.isfinite().all():
        raise ValueError(f"{what} has values that are not finite")
    wide = matrix.float() if matrix.element_size() < 4 else matrix
    try:
        values, vectors = torch.linalg.eigh(wide)
        if values.isfinite().all() and vectors.isfinite().all():
            return values, vectors
    except torch.linalg.LinAlgError:
        pass
    try:
        values, vectors = torch.linalg.eigh(wide.double())
    except torch.linalg.LinAlgError as error:
        raise ValueError(f"the eigendecomposition of {what} failed: {error}") from error
    return values.to(wide.dtype), vectors.to(wide.dtype)


class Basis(Protocol):
    """An orthonormal basis of the matrices (o, i)."""

    def to(self, vectors: Tensor) -> Tensor:
        """Coordinates (..., o, i) of vectors (..., o, i)."""
        ...

    def back(self, coordinates: Tensor) -> Tensor:
        """The vectors with these coordinates."""
        ...


@dataclass(frozen=True)
class ProductBasis:
    """`kron(left[:, p], right[:, q])`, of eigenvectors (o, o) and (i, i); None is the identity."""

    left: Tensor | None
    right: Tensor | None

    def to(self, vectors: Tensor) -> Tensor:
        vectors = vectors if self.left is None else self.left.mT @ vectors
        return vectors if self.right is None else vectors @ self.right

    def back(self, coordinates: Tensor) -> Tensor:
        vectors = coordinates if self.left is None else self.left @ coordinates
        return vectors if self.right is None else vectors @ self.right.mT


@dataclass(frozen=True)
class DenseBasis:
    """The columns of `vectors`, (o * i, o * i)."""

    vectors: Tensor

    def to(self, vectors: Tensor) -> Tensor:
        return (vectors.flatten(-2) @ self.vectors).view(vectors.shape)

    def back(self, coordinates: Tensor) -> Tensor:
        return (coordinates.flatten(-2) @ self.vectors.mT).view(coordinates.shape)


@dataclass(frozen=True)
class Spectrum:
    """A symmetric matrix by its eigenvectors and eigenvalues.

    Attributes:
        basis: the eigenvectors.
        values: their eigenvalues, (o, i).
        factors: where `values` is the outer product of the eigenvalues (o,) and (i,) of two
            factors: those.
    """

    basis: Basis
    values: Tensor
    factors: tuple[Tensor, Tensor] | None = None

    @staticmethod
    def of_factors(
        left: tuple[Tensor, Tensor | None], right: tuple[Tensor, Tensor | None]
    ) -> Spectrum:
        """Of a Kronecker product, from the eigenvalues and eigenvectors of its factors."""
        values = left[0][:, None] * right[0]
        return Spectrum(ProductBasis(left[1], right[1]), values, (left[0], right[0]))
