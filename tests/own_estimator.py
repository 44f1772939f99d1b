"""An estimator of one's own, in a file of its own: docs/design.md shows it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

import kfoc
from kfoc.samples.base import LayerSamples, gradient_chunks


@dataclass
class Sum(kfoc.State):
    squares: Tensor  # of all entries of all gradients, a scalar
    shape: tuple[int, int]

    def add(self, samples: LayerSamples, alone: bool) -> None:
        for gradients in gradient_chunks(samples, 2**20):
            self.squares += gradients.square().sum()

    def totals(self) -> list[Tensor]:
        return [self.squares]

    def block(self, num_samples: float) -> kfoc.Block:
        o, i = self.shape
        return kfoc.DiagonalBlock((self.squares / (num_samples * o * i)).expand(o, i).clone())


@dataclass(frozen=True)
class Isotropic(kfoc.Estimator):
    """The multiple of the identity that is closest to F."""

    def begin(self, layer: str, samples: LayerSamples) -> kfoc.State:
        return Sum(samples.grads.new_zeros(()), samples.shape)
