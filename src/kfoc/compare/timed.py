"""What an estimator spends on each layer."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from kfoc import Block, Estimator


class State(NamedTuple):
    """An estimator's state of one layer, and whose it is."""

    layer: str
    own: Any


@dataclass(frozen=True)
class Timed(Estimator):
    """An estimator that also adds up its seconds by layer, of all passes.

    The forward and backward pass, which layers share, is not in them.

    Attributes:
        base: the estimator.
        synchronise: wait for the GPU before the clock is read.
        seconds: layer -> what was spent so far.
    """

    base: Estimator
    synchronise: bool = False
    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))

    def check(self) -> None:
        self.base.check()

    @property
    def pass_limit(self) -> int:
        return self.base.pass_limit

    @property
    def largest_factor(self) -> int | None:
        return self.base.largest_factor

    @contextmanager
    def _on(self, layer: str) -> Iterator[None]:
        if self.synchronise:
            torch.cuda.synchronize()
        start = time.perf_counter()
        yield
        if self.synchronise:
            torch.cuda.synchronize()
        self.seconds[layer] += time.perf_counter() - start

    def init(self, layer: str, samples: Any) -> State:
        with self._on(layer):
            return State(layer, self.base.init(layer, samples))

    def update(self, state: State, samples: Any, *, alone: bool) -> State:
        with self._on(state.layer):
            return state._replace(own=self.base.update(state.own, samples, alone=alone))

    def next_pass(self, state: State) -> tuple[State, bool]:
        with self._on(state.layer):
            own, done = self.base.next_pass(state.own)
        return state._replace(own=own), done

    def change(self, state: State) -> float | None:
        return self.base.change(state.own)

    def finish(self, state: State, num_samples: float) -> Block:
        with self._on(state.layer):
            return self.base.finish(state.own, num_samples)
