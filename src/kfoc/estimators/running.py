"""The paper's K-FOC_running."""

from __future__ import annotations

from torch import Tensor

from kfoc.estimators.aggregation import Aggregation
from kfoc.estimators.head import Head
from kfoc.estimators.options import Options
from kfoc.estimators.pooling import Pooling, summed
from kfoc.linalg.scaling import norm_of
from kfoc.nearest.pair import Pieces
from kfoc.samples.linear import Samples


class Running(Aggregation):
    """Algorithm 1 on the estimate so far and the new batch's optimum, as sums over samples.

    A head of one triple, without a tail, that takes in a batch at a time.
    """

    head: Head | None
    weight: float

    def __init__(self, config: Options, samples: Samples) -> None:
        super().__init__(config, samples)
        self.head = None  # made when first needed: a single batch does without
        self.weight = 0.0

    def add(self, samples: Samples, alone: bool) -> None:
        if alone:
            self.solve_alone(samples)
            return
        rescaled, scale = samples.rescaled()  # or factors might vanish where sigma does not
        batch = self.solved(rescaled)
        self.weight += samples.num_samples
        norms = norm_of(batch.left), norm_of(batch.right)
        if not all(norms):
            return
        left, right = batch.left.div_(norms[0]), batch.right.div_(norms[1])
        sigma = batch.sigma * scale * samples.num_samples
        self._head().add(Pieces.of(left[None], right[None], [sigma]))

    def _head(self) -> Head:
        if self.head is None:
            self.head = Head(1, False, ((self.shape[0],) * 2, self.right_shape), self.like)
        return self.head

    def pooled(self) -> Pooling[None]:
        """Algorithm 1 on the estimates of all ranks."""
        (self.weight,) = yield from summed(self.weight)
        yield from self._head().pooled()

    def decay(self, factor: float) -> None:
        self.weight *= factor
        if self.head is not None:
            self.head.scale(factor)

    def result(self, num_samples: float) -> tuple[Tensor, Tensor]:
        if self.found is not None:
            return self.found
        return self.of_pair(self._head().terms, 1 / (self.weight or 1.0))
