"""Running out of memory: how it shows, and what to do about it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch

# torch.OutOfMemoryError came with torch 2.5; before, and under this name still, it is CUDA's.
OutOfMemory: type[RuntimeError] = torch.cuda.OutOfMemoryError
# How the allocator of the CPU says it, in a plain RuntimeError.
_ON_CPU = ("can't allocate memory", "not enough memory", "Cannot allocate memory")


class Footprint(NamedTuple):
    """Bytes that the tensors of one layer take in a fit, without those of a batch's own work.

    Attributes:
        state: at most so many between two batches, however many there have been.
        block: of the finished block.
    """

    state: int
    block: int

    def __add__(self, other: object) -> Footprint:
        """Of two layers, or groups of a layer, that are held at the same time."""
        if not isinstance(other, Footprint):
            return NotImplemented
        return Footprint(self.state + other.state, self.block + other.block)


def out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory ran out, on whatever device."""
    if isinstance(error, (OutOfMemory, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _ON_CPU)


@contextmanager
def advised(what: str, advice: str) -> Iterator[None]:
    """Where memory runs out inside, say in what, and what to lower.

    Raises:
        OutOfMemory: in the place of whichever exception said so.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error) or isinstance(error.__cause__, (RuntimeError, MemoryError)):
            raise  # something else, or one that says already in what
        raise OutOfMemory(f"{what}: memory ran out: {advice} ({error})") from error


@contextmanager
def within(what: str) -> Iterator[None]:
    """Put `what` before the message of memory that ran out."""
    try:
        yield
    except OutOfMemory as error:
        raise OutOfMemory(f"{what}: {error}") from error.__cause__ or error
