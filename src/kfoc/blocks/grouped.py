"""Block-diagonal combinations of blocks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from kfoc.blocks import sound
from kfoc.blocks.base import Block
from kfoc.blocks.damped import DampedBlock, Damping


@dataclass(frozen=True)
class GroupedBlock(Block):
    """Blocks of groups of outputs, in order along the diagonal: zero between the groups.

    A grouped convolution has one, with a Kronecker product per group.
    """

    blocks: tuple[Block, ...]

    @property
    def shape(self) -> tuple[int, int]:
        return sum(self.sizes), self.blocks[0].shape[1]

    @property
    def sizes(self) -> list[int]:
        """Outputs of each group."""
        return [block.shape[0] for block in self.blocks]

    def check(self) -> None:
        if not self.blocks or not all(isinstance(block, Block) for block in self.blocks):
            raise ValueError("its groups must be blocks, at least one of them")
        for block in self.blocks:
            block.check()
        columns = {block.shape[1] for block in self.blocks}
        if len(columns) > 1:
            raise ValueError(f"its groups must have as many inputs, found {sorted(columns)}")
        sound.same_dtype(*self.tensors())

    def to_dense(self) -> Tensor:
        return torch.block_diag(*[block.to_dense() for block in self.blocks])

    def matvec(self, vectors: Tensor) -> Tensor:
        self._check_vectors(vectors)
        return by_parts([block.matvec for block in self.blocks], self.sizes, vectors)

    def trace(self) -> float:
        return sum(block.trace() for block in self.blocks)

    def scaled(self, factor: float) -> GroupedBlock:
        return replace(self, blocks=tuple(block.scaled(factor) for block in self.blocks))

    def to(self, *args: Any, **kwargs: Any) -> GroupedBlock:
        # Group by group, as blocks take with them what they keep.
        return replace(self, blocks=tuple(block.to(*args, **kwargs) for block in self.blocks))

    def forget(self) -> None:
        for block in self.blocks:
            block.forget()

    def damped(self, damping: Damping) -> DampedGroups:
        return DampedGroups(tuple(block.damped(damping) for block in self.blocks))

    def inner(self, other: Block) -> float:
        if not isinstance(other, GroupedBlock):
            return other.inner(self)
        if other.sizes != self.sizes:
            raise ValueError(f"the groups differ: {self.sizes} and {other.sizes} outputs")
        return sum(a.inner(b) for a, b in zip(self.blocks, other.blocks, strict=True))

    def inner_kronecker(self, left: Tensor, right: Tensor) -> Tensor:
        total, start = left.new_zeros(()), 0
        for block in self.blocks:
            rows = slice(start, start + block.shape[0])
            total = total + block.inner_kronecker(left[rows, rows], right)
            start = rows.stop
        return total

    def diagonal_in(self, left: Tensor | None, right: Tensor | None) -> Tensor:
        if left is None:
            return torch.cat([block.diagonal_in(None, right) for block in self.blocks])
        parts = zip(self.blocks, left.split(self.sizes), strict=True)
        return torch.stack([block.diagonal_in(part, right) for block, part in parts]).sum(0)


@dataclass(frozen=True)
class DampedGroups(DampedBlock):
    """Each group damped on its own."""

    blocks: tuple[DampedBlock, ...]

    @property
    def dtype(self) -> torch.dtype:
        return self.blocks[0].dtype

    @property
    def shape(self) -> tuple[int, int]:
        return sum(self.sizes), self.blocks[0].shape[1]

    @property
    def device(self) -> torch.device:
        return self.blocks[0].device

    @property
    def sizes(self) -> list[int]:
        return [block.shape[0] for block in self.blocks]

    def power(self, vectors: Tensor, exponent: float) -> Tensor:
        def operator(block: DampedBlock) -> Callable[[Tensor], Tensor]:
            return lambda part: block.power(part, exponent)

        return by_parts([operator(block) for block in self.blocks], self.sizes, vectors)

    def draw(self, noise: Tensor) -> Tensor:
        return by_parts([block.draw for block in self.blocks], self.sizes, noise)

    def logdet(self) -> float:
        return sum(block.logdet() for block in self.blocks)

    def inverse_diagonal(self) -> Tensor:
        return torch.cat([block.inverse_diagonal() for block in self.blocks])

    def eigenvalues(self) -> Tensor:
        return torch.cat([block.eigenvalues() for block in self.blocks])

    def redamped(self, damping: Damping) -> DampedGroups:
        return DampedGroups(tuple(block.redamped(damping) for block in self.blocks))


def by_parts(
    operators: list[Callable[[Tensor], Tensor]], sizes: list[int], vectors: Tensor
) -> Tensor:
    """Each operator on its rows of `vectors`, (..., o, i)."""
    parts = zip(operators, vectors.split(sizes, -2), strict=True)
    return torch.cat([operator(part) for operator, part in parts], -2)
