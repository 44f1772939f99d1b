"""What estimators ask of the other ranks, without knowing how it is sent.

An estimator's state is pooled by a generator that yields lists of requests and goes on once they
are met. The generators of all layers run side by side, so that the requests of one round travel
together (`kfoc.distributed`). Which requests it makes must follow from what all ranks know, never
from a rank's own data.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


@dataclass(eq=False)
class Sum:
    """Replace contiguous tensors, in place, by their sums over the ranks."""

    tensors: list[Tensor]


@dataclass(eq=False)
class Largest:
    """Replace numbers by the largest of any rank."""

    values: list[float]


@dataclass(eq=False)
class Gather:
    """Collect tensors, of the same shapes on all ranks, into `found`: a list for every rank."""

    tensors: list[Tensor]
    found: list[list[Tensor]] = field(default_factory=list)


Request = Sum | Largest | Gather
Pooling = Generator[list[Request], None, T]


def together(poolings: Sequence[Pooling[T]]) -> Pooling[list[T]]:
    """Several poolings side by side, with the requests of a round in one list."""
    results: dict[int, T] = {}
    while True:
        requests: list[Request] = []
        for number, pooling in enumerate(poolings):
            if number in results:
                continue
            try:
                requests += next(pooling)
            except StopIteration as end:
                results[number] = end.value
        if len(results) == len(poolings):
            return [results[number] for number in range(len(poolings))]
        yield requests


def summed(*numbers: float) -> Pooling[list[float]]:
    """The sums of numbers over the ranks, in float64."""
    tensor = torch.tensor(numbers, dtype=torch.float64, device="cpu")
    yield [Sum([tensor])]
    return tensor.tolist()


def largest(*numbers: float) -> Pooling[list[float]]:
    """The largest of any rank, one by one."""
    request = Largest(list(numbers))
    yield [request]
    return request.values
