"""Kronecker products."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor

from kfoc.blocks import factors, sound
from kfoc.blocks.base import Block
from kfoc.blocks.cholesky import DampedProduct
from kfoc.blocks.damped import DampedBlock, Damping
from kfoc.blocks.decomposed import DecomposedBlock
from kfoc.blocks.spectrum import Spectrum

AnyKronecker = TypeVar("AnyKronecker", bound="KroneckerBlock")


@dataclass(frozen=True)
class KroneckerBlock(DecomposedBlock):
    """`kron(left, right)`, with `left` (o, o) of output gradients and `right` (i, i) of inputs."""

    left: Tensor
    right: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        return self.left.shape[0], self.right.shape[0]

    def check(self) -> None:
        sound.symmetric("left factor", self.left)
        sound.symmetric("right factor", self.right)
        sound.same_dtype(self.left, self.right)

    def to_dense(self) -> Tensor:
        return torch.kron(self.left, self.right)

    def matvec(self, vectors: Tensor) -> Tensor:
        self._check_vectors(vectors)
        return factors.times_right(self.left @ vectors, self.right)

    def trace(self) -> float:
        left, right = (factors.diagonal(f).double().sum() for f in (self.left, self.right))
        return (left * right).item()

    def scaled(self: AnyKronecker, factor: float) -> AnyKronecker:
        root = math.sqrt(factor)
        return replace(self, left=self.left * root, right=self.right * root)

    def damped(self, damping: Damping) -> DampedBlock:
        if self.kept is None:
            product = DampedProduct.of(self, self.left, self.right, damping)
            if product is not None:
                return product
        return super().damped(damping)

    def decomposed(self) -> dict[str, Tensor]:
        return {"left_": self.left, "right_": self.right}

    def decomposition(self) -> Spectrum:
        left = factors.eigen(self.left, "the left factor")
        return Spectrum.of_factors(left, factors.eigen(self.right, "the right factor"))

    def inner(self, other: Block) -> float:
        return other.inner_kronecker(self.left, self.right).item()

    def inner_kronecker(self, left: Tensor, right: Tensor) -> Tensor:
        return factors.inner(self.left, left) * factors.inner(self.right, right)

    def diagonal_in(self, left: Tensor | None, right: Tensor | None) -> Tensor:
        rows = factors.diagonal_in(self.left, left)
        return rows[:, None] * factors.diagonal_in(self.right, right)


@dataclass(frozen=True)
class KroneckerDiagonalBlock(KroneckerBlock):
    """`kron(left, diag(right))`, with `left` (o, o) and `right` (i,).

    For inputs that are one-hot, as those of an embedding: `right` has an entry per token.
    """

    def check(self) -> None:
        sound.symmetric("left factor", self.left)
        sound.same_dtype(self.left, sound.numbers("right factor", self.right, 1))

    def to_dense(self) -> Tensor:
        return torch.kron(self.left, torch.diag(self.right))
