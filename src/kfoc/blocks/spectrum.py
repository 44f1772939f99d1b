"""Symmetric matrices by their eigenvalues, and the bases that these belong to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class Basis(Protocol):
    """An orthonormal basis of the matrices (o, i)."""

    def to(self, vectors: Tensor) -> Tensor:
        """Coordinates (..., o, i) of vectors (..., o, i)."""
        ...

    def back(self, coordinates: Tensor) -> Tensor:
        """The vectors with these coordinates."""
        ...

    def diagonal(self, values: Tensor) -> Tensor:
        """The diagonal (o, i) of the matrix that has these eigenvalues (o, i) in the basis."""
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

    def diagonal(self, values: Tensor) -> Tensor:
        rows = values if self.left is None else self.left.square() @ values
        return rows if self.right is None else rows @ self.right.square().mT


@dataclass(frozen=True)
class DenseBasis:
    """The columns of `vectors`, (o * i, o * i)."""

    vectors: Tensor

    def to(self, vectors: Tensor) -> Tensor:
        return (vectors.flatten(-2) @ self.vectors).view(vectors.shape)

    def back(self, coordinates: Tensor) -> Tensor:
        return (coordinates.flatten(-2) @ self.vectors.mT).view(coordinates.shape)

    def diagonal(self, values: Tensor) -> Tensor:
        return (self.vectors.square() @ values.flatten()).view(values.shape)


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

    def parts(self) -> dict[str, Tensor]:
        """The tensors that it is made of, by name, as `of_parts` takes them.

        Of a Kronecker product those of its factors, of other matrices those of the whole.
        """
        if isinstance(self.basis, DenseBasis):
            return {"values": self.values, "vectors": self.basis.vectors}
        assert isinstance(self.basis, ProductBasis)
        assert self.factors is not None
        sides = {"left": self.basis.left, "right": self.basis.right}
        found = {f"{side}_vectors": each for side, each in sides.items() if each is not None}
        return found | dict(zip(("left_values", "right_values"), self.factors, strict=True))

    @staticmethod
    def of_parts(parts: Mapping[str, Tensor]) -> Spectrum:
        """What `parts` was called on.

        Raises:
            LookupError: parts of neither kind.
        """
        if "values" in parts:
            return Spectrum(DenseBasis(parts["vectors"]), parts["values"])
        left = parts["left_values"], parts.get("left_vectors")
        return Spectrum.of_factors(left, (parts["right_values"], parts.get("right_vectors")))

    def moved(self, device: torch.device) -> Spectrum:
        """The same on another device."""
        return Spectrum.of_parts({name: part.to(device) for name, part in self.parts().items()})
