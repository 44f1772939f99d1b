"""A curvature's blocks in another size: what is due to their scale, and what to their shape."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import kfoc
from kfoc.samples.base import LayerSamples

SIZES: dict[str, Callable[[kfoc.Block], float]] = {
    "trace": lambda block: block.trace(),
    "norm": lambda block: block.frobenius_norm(),
}


@dataclass
class _Pair(kfoc.State):
    own: kfoc.State
    reference: kfoc.State
    size: Callable[[kfoc.Block], float]

    def add(self, samples: Any, alone: bool) -> None:
        self.own.add(samples, alone)
        self.reference.add(samples, alone)

    def decay(self, factor: float) -> None:
        self.own.decay(factor)
        self.reference.decay(factor)

    def block(self, num_samples: float) -> kfoc.Block:
        block, wanted = self.own.block(num_samples), self.size(self.reference.block(num_samples))
        found = self.size(block)
        return block.scaled(wanted / found) if found > 0 else block


@dataclass(frozen=True)
class Rescaled(kfoc.Estimator):
    """`of`, each block scaled to the trace or norm that `reference` gives that layer.

    `kfoc.Diagonal()` as the reference has the trace of F itself.
    """

    of: kfoc.Estimator
    reference: kfoc.Estimator
    size: str = "trace"

    def begin(self, layer: str, samples: LayerSamples) -> kfoc.State:
        begun = [each.begin(layer, samples) for each in (self.of, self.reference)]
        return _Pair(*begun, SIZES[self.size])

    def streaming(self) -> kfoc.Estimator:
        return Rescaled(self.of.streaming(), self.reference.streaming(), self.size)
