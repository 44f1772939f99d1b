"""Errors that say where and what to do: memory that runs out, and the layer's name."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple, TypeVar

import torch

T = TypeVar("T")
R = TypeVar("R")

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
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _ON_CPU)


# Classes and no generators: some are entered for every layer of every batch.
class advised:  # noqa: N801  (a context, used as contextlib's are)
    """Where memory runs out inside, say in what, and what to lower.

    Raises:
        torch.OutOfMemoryError: in the place of whichever exception said so.
    """

    def __init__(self, what: str, advice: str) -> None:
        self.what, self.advice = what, advice

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if not isinstance(error, (RuntimeError, MemoryError)) or not out_of_memory(error):
            return
        if isinstance(error.__cause__, (RuntimeError, MemoryError)):
            return  # one that says already in what
        text = f"{self.what}: memory ran out: {self.advice} ({error})"
        raise torch.OutOfMemoryError(text) from error


class within:  # noqa: N801
    """Put `what` before the message of memory that ran out."""

    def __init__(self, what: str) -> None:
        self.what = what

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, torch.OutOfMemoryError):
            raise torch.OutOfMemoryError(f"{self.what}: {error}") from error.__cause__ or error


@contextmanager
def naming(layer: str) -> Iterator[None]:
    """Put the layer's name in front of errors."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"layer {layer!r}: {error}") from error


def by_layer(function: Callable[[str, T], R], items: Mapping[str, T]) -> dict[str, R]:
    """The function's result for every layer, whose name is put in front of errors."""
    found = {}
    for layer, item in items.items():
        with naming(layer):
            found[layer] = function(layer, item)
    return found


def problem(layer: str, what: str) -> ValueError:
    """The error that says what is wrong with a layer."""
    return ValueError(f"layer {layer!r}: {what}")
