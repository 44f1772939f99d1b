"""Diagonal blocks."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kfoc.blocks import factors, sound
from kfoc.blocks.base import Block, SpectralBlock
from kfoc.blocks.spectrum import ProductBasis, Spectrum


@dataclass(frozen=True)
class DiagonalBlock(SpectralBlock):
    """A diagonal matrix, kept as `diagonal` in the shape (o, i) of the weight."""

    diagonal: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        return self.diagonal.shape[0], self.diagonal.shape[1]

    def check(self) -> None:
        sound.numbers("diagonal", self.diagonal, 2)

    def to_dense(self) -> Tensor:
        return torch.diag(self.diagonal.flatten())

    def matvec(self, vectors: Tensor) -> Tensor:
        self._check_vectors(vectors)
        return self.diagonal * vectors

    def trace(self) -> float:
        return self.diagonal.double().sum().item()

    def scaled(self, factor: float) -> DiagonalBlock:
        return replace(self, diagonal=self.diagonal * factor)

    def spectrum(self) -> Spectrum:
        values, _ = factors.eigen(self.diagonal.flatten(), "the diagonal")
        return Spectrum(ProductBasis(None, None), values.view(self.shape))

    def inner(self, other: Block) -> float:
        return (self.diagonal * other.diagonal_in(None, None)).sum().item()

    def inner_kronecker(self, left: Tensor, right: Tensor) -> Tensor:
        return factors.diagonal(left) @ self.diagonal @ factors.diagonal(right)

    def diagonal_in(self, left: Tensor | None, right: Tensor | None) -> Tensor:
        rows = self.diagonal if left is None else left.square().mT @ self.diagonal
        return rows if right is None else rows @ right.square()
