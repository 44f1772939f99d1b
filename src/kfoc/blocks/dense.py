"""Blocks without structure."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kfoc.blocks import sound
from kfoc.blocks.base import Block
from kfoc.blocks.decomposed import DecomposedBlock
from kfoc.blocks.spectrum import DenseBasis, Spectrum
from kfoc.linalg.eigen import eigh


@dataclass(frozen=True)
class DenseBlock(DecomposedBlock):
    """Any symmetric matrix, (o * i, o * i), of a weight of shape `weight_shape`."""

    matrix: Tensor
    weight_shape: tuple[int, int]

    @property
    def shape(self) -> tuple[int, int]:
        return self.weight_shape

    def check(self) -> None:
        sound.symmetric("matrix", self.matrix)
        shape = self.weight_shape
        pair = isinstance(shape, tuple) and [type(side) for side in shape] == [int, int]
        if not pair or math.prod(shape) != len(self.matrix):
            raise ValueError(
                f"its matrix has {len(self.matrix)} rows, for a weight of shape {shape!r}"
            )

    def to_dense(self) -> Tensor:
        return self.matrix

    def matvec(self, vectors: Tensor) -> Tensor:
        self._check_vectors(vectors)
        return (vectors.flatten(-2) @ self.matrix).view(vectors.shape)

    def trace(self) -> float:
        return self.matrix.diagonal().double().sum().item()

    def scaled(self, factor: float) -> DenseBlock:
        return replace(self, matrix=self.matrix * factor)

    def decomposed(self) -> dict[str, Tensor]:
        return {"": self.matrix}

    def decomposition(self) -> Spectrum:
        values, vectors = eigh(self.matrix)
        return Spectrum(DenseBasis(vectors), values.view(self.shape))

    def inner(self, other: Block) -> float:
        return (self.matrix * other.to_dense()).sum().item()

    def inner_kronecker(self, left: Tensor, right: Tensor) -> Tensor:
        o, i = self.shape
        matrix = self.matrix.view(o, i, o, i)
        if right.ndim == 1:
            over = torch.einsum("aibi,i->ab", matrix, right)
        else:
            over = torch.einsum("aibj,ij->ab", matrix, right)
        return (over * left).sum()

    def diagonal_in(self, left: Tensor | None, right: Tensor | None) -> Tensor:
        o, i = self.shape
        matrix = self.matrix.view(o, i, o, i)
        if right is None:
            over = matrix.diagonal(dim1=1, dim2=3)  # (o, o, i)
        else:
            over = torch.einsum("aibq,iq->abq", matrix @ right, right)
        if left is None:
            return over.diagonal().mT
        return torch.einsum("abq,ap,bp->pq", over, left, left)
