"""An aggregation of one's own, in a file of its own: docs/design.md shows it."""

from __future__ import annotations

from torch import Tensor

from kfoc.estimators.aggregation import Aggregation
from kfoc.linalg.scaling import balance, norm_of
from kfoc.samples.linear import Samples


class Newest(Aggregation):
    """The optimum of the last batch."""

    def add(self, samples: Samples, alone: bool) -> None:
        self.settle(self.solved(samples))

    def result(self, num_samples: float) -> tuple[Tensor, Tensor]:
        if self.found is None:
            return self.like.new_zeros((self.shape[0],) * 2), self.like.new_zeros(self.right_shape)
        left, right = self.found
        size = norm_of(left) * norm_of(right)
        return balance(left / (norm_of(left) or 1.0), right / (norm_of(right) or 1.0), size)
