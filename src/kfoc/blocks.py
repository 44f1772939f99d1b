"""The kinds of curvature block, one class each: what a block is, not how it was estimated.

A block approximates the mean Fisher F of one layer's extended weight `[W | b]` of shape (o, i),
with `vec` row-major, so that `F ~ torch.kron(left, right)`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class Report:
    """What is known of how a block came about.

    Attributes:
        relative_error: `||F - block||_F / ||F||_F` against the exact block of the data seen, or
            None where nobody asked for it (`fit(..., probes=16)`) and it did not come for free.
        standard_error: the standard error of `relative_error`; 0 where it is exact.
        steps: half steps of the power iteration in the last solve (0: none).
        converged: False where an iteration ended at its step or pass limit.
        plan: the contraction used last, with what it was chosen by; "" where there is no choice.
    """

    relative_error: float | None = None
    standard_error: float | None = None
    steps: int = 0
    converged: bool = True
    plan: str = ""


@dataclass(frozen=True)
class Block(ABC):
    """A symmetric positive semi-definite matrix of size o * i, in one of several structures."""

    report: Report = field(default_factory=Report, kw_only=True)

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int]:
        """(o, i): the shape of the extended weight that the block is about."""

    @abstractmethod
    def to_dense(self) -> Tensor:
        """The block as a matrix, (o * i, o * i), row-major over (o, i)."""

    @abstractmethod
    def matvec(self, vectors: Tensor) -> Tensor:
        """The block times `vectors`, (..., o, i), of the same shape."""

    @property
    def relative_error(self) -> float | None:
        """See `Report.relative_error`."""
        return self.report.relative_error

    @property
    def relative_error_standard_error(self) -> float | None:
        """See `Report.standard_error`."""
        return self.report.standard_error

    def _check_vectors(self, vectors: Tensor) -> None:
        if tuple(vectors.shape[-2:]) != self.shape:
            raise ValueError(
                f"vectors must end in the shape {self.shape} of the block's weight, found "
                f"{tuple(vectors.shape)}"
            )


@dataclass(frozen=True)
class KroneckerBlock(Block):
    """`kron(left, right)`, with `left` (o, o) of output gradients and `right` (i, i) of inputs."""

    left: Tensor
    right: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        return self.left.shape[0], self.right.shape[0]

    def to_dense(self) -> Tensor:
        return torch.kron(self.left, self.right)

    def matvec(self, vectors: Tensor) -> Tensor:
        self._check_vectors(vectors)
        return self.left @ vectors @ self.right


@dataclass(frozen=True)
class GroupedBlock(Block):
    """Blocks of groups of outputs, in order along the diagonal: zero between the groups.

    A grouped convolution has one, with a Kronecker product per group.
    """

    blocks: tuple[Block, ...]

    @property
    def shape(self) -> tuple[int, int]:
        return sum(block.shape[0] for block in self.blocks), self.blocks[0].shape[1]

    def to_dense(self) -> Tensor:
        return torch.block_diag(*[block.to_dense() for block in self.blocks])

    def matvec(self, vectors: Tensor) -> Tensor:
        self._check_vectors(vectors)
        parts = vectors.split([block.shape[0] for block in self.blocks], -2)
        products = [block.matvec(part) for block, part in zip(self.blocks, parts, strict=True)]
        return torch.cat(products, -2)


@dataclass(frozen=True)
class DiagonalBlock(Block):
    """A diagonal matrix, kept as `diagonal` in the shape (o, i) of the weight."""

    diagonal: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        return self.diagonal.shape[0], self.diagonal.shape[1]

    def to_dense(self) -> Tensor:
        return torch.diag(self.diagonal.flatten())

    def matvec(self, vectors: Tensor) -> Tensor:
        self._check_vectors(vectors)
        return self.diagonal * vectors


@dataclass(frozen=True)
class DenseBlock(Block):
    """Any symmetric matrix, (o * i, o * i), of a weight of shape `weight_shape`."""

    matrix: Tensor
    weight_shape: tuple[int, int]

    @property
    def shape(self) -> tuple[int, int]:
        return self.weight_shape

    def to_dense(self) -> Tensor:
        return self.matrix

    def matvec(self, vectors: Tensor) -> Tensor:
        self._check_vectors(vectors)
        return (vectors.flatten(-2) @ self.matrix).view(vectors.shape)


@dataclass(frozen=True)
class KroneckerDiagonalBlock(Block):
    """`kron(left, diag(right))`, with `left` (o, o) and `right` (i,), the diagonal alone.

    An embedding with a large vocabulary has one: `left` (d, d) of output gradients, and in `right`
    a weight per token.
    """

    left: Tensor
    right: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        return self.left.shape[0], self.right.shape[0]

    def to_dense(self) -> Tensor:
        return torch.kron(self.left, torch.diag(self.right))

    def matvec(self, vectors: Tensor) -> Tensor:
        self._check_vectors(vectors)
        return (self.left @ vectors) * self.right
