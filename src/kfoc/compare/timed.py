"""What an estimator spends on each layer."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from kfoc import Block, Estimator, State

T = TypeVar("T")


def timed(estimator: Estimator, seconds: dict[str, float], cuda: bool = False) -> Estimator:
    """A copy of the estimator that adds to `seconds` what it spends on each layer, in all passes.

    All else that a fit may ask of an estimator, a budget of memory for one, is as it was. The
    forward and backward pass are not in the seconds.

    Args:
        cuda: wait for the GPU before the clock is read.
    """
    clocked = copy.copy(estimator)

    def begin(layer: str, samples: Any) -> State:
        def clock(call: Callable[..., T], *arguments: Any) -> T:
            if cuda:
                torch.cuda.synchronize()
            start = time.perf_counter()
            result = call(*arguments)
            if cuda:
                torch.cuda.synchronize()
            seconds[layer] = seconds.get(layer, 0.0) + time.perf_counter() - start
            return result

        return _Timed(clock(estimator.begin, layer, samples), clock)

    def sized(layouts: Any) -> Estimator:
        return timed(estimator.sized(layouts), seconds, cuda)

    for name, method in (("begin", begin), ("sized", sized)):
        object.__setattr__(clocked, name, method)  # of a frozen dataclass too
    return clocked


@dataclass
class _Timed(State):
    state: State
    clock: Callable[..., Any]

    def add(self, samples: Any, alone: bool) -> None:
        self.clock(self.state.add, samples, alone)

    def next_pass(self) -> bool:
        return self.clock(self.state.next_pass)

    def change(self) -> float | None:
        return self.state.change()

    def decay(self, factor: float) -> None:
        self.clock(self.state.decay, factor)

    def pooled(self) -> Any:
        yield from self.state.pooled()

    def block(self, num_samples: float) -> Block:
        return self.clock(self.state.block, num_samples)
