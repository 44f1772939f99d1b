"""Blocks that are diagonal in a Kronecker-factored eigenbasis."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kfoc.blocks import factors, sound
from kfoc.blocks.base import Block, SpectralBlock
from kfoc.blocks.spectrum import ProductBasis, Spectrum


@dataclass(frozen=True)
class EigenBlock(SpectralBlock):
    """`kron(U, V) diag(eigenvalues) kron(U, V)^T` (George et al. 2018).

    Attributes:
        left_vectors: U, (o, o), orthonormal columns.
        right_vectors: V, (i, i), likewise.
        eigenvalues: (o, i); entry (p, q) is that of `kron(U[:, p], V[:, q])`.
    """

    left_vectors: Tensor
    right_vectors: Tensor
    eigenvalues: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        return self.eigenvalues.shape[0], self.eigenvalues.shape[1]

    def check(self) -> None:
        sound.orthonormal("left_vectors", self.left_vectors)
        sound.orthonormal("right_vectors", self.right_vectors)
        sound.numbers("eigenvalues", self.eigenvalues, 2)
        sound.same_dtype(*self.tensors())

    def to_dense(self) -> Tensor:
        basis = torch.kron(self.left_vectors, self.right_vectors)
        return (basis * self.eigenvalues.flatten()) @ basis.mT

    def matvec(self, vectors: Tensor) -> Tensor:
        self._check_vectors(vectors)
        basis = ProductBasis(self.left_vectors, self.right_vectors)
        return basis.back(basis.to(vectors) * self.eigenvalues)

    def trace(self) -> float:
        return self.eigenvalues.double().sum().item()

    def scaled(self, factor: float) -> EigenBlock:
        return replace(self, eigenvalues=self.eigenvalues * factor)

    def spectrum(self) -> Spectrum:
        values, _ = factors.eigen(self.eigenvalues.flatten(), "the block of eigenvalues")
        basis = ProductBasis(*(v.to(values) for v in (self.left_vectors, self.right_vectors)))
        return Spectrum(basis, values.view(self.shape))

    def inner(self, other: Block) -> float:
        diagonal = other.diagonal_in(self.left_vectors, self.right_vectors)
        return (self.eigenvalues * diagonal).sum().item()

    def inner_kronecker(self, left: Tensor, right: Tensor) -> Tensor:
        rows = factors.diagonal_in(left, self.left_vectors)
        return rows @ self.eigenvalues @ factors.diagonal_in(right, self.right_vectors)

    def diagonal_in(self, left: Tensor | None, right: Tensor | None) -> Tensor:
        rows = self.left_vectors.mT if left is None else self.left_vectors.mT @ left
        columns = self.right_vectors.mT if right is None else self.right_vectors.mT @ right
        return rows.square().mT @ self.eigenvalues @ columns.square()
