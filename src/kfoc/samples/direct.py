"""Samples of layers that are no linear map: per-sample gradients themselves."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from kfoc.linalg.scaling import magnitude, power_of_two, squared


@dataclass(frozen=True)
class Direct:
    """Per-sample gradients themselves, for layers whose gradient is no sum of outer products.

    Attributes:
        grads: X, (S, N, o, i): for a normalisation layer a row per feature, and a column each for
            its scale and its shift.
    """

    grads: Tensor

    @property
    def num_samples(self) -> int:
        return self.grads.shape[1]

    @property
    def num_positions(self) -> int:
        return 0

    @property
    def num_directions(self) -> int:
        return self.grads.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        return self.grads.shape[2], self.grads.shape[3]

    @cached_property
    def magnitudes(self) -> tuple[float, float]:
        return 1.0, magnitude(self.grads)

    def gradients(self, start: int, stop: int) -> Tensor:
        return self.grads[:, start:stop]

    def rescaled(self) -> tuple[Direct, float]:
        scale = power_of_two(self.magnitudes[1])
        scaled = Direct(self.grads / scale) if scale != 1.0 else self
        return scaled, squared(scale) if all(self.magnitudes) else 0.0

    def silent(self, count: int) -> Direct:
        return Direct(self.grads.new_zeros(self.num_directions, count, *self.shape))

    def of_directions(self, chosen: slice) -> Direct:
        return Direct(self.grads[chosen])
