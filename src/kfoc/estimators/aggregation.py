"""How a layer's batches add up to one Kronecker product: the paper's two ways, batch by batch."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import cached_property
from typing import TYPE_CHECKING

from torch import Tensor

from kfoc.blocks import Report
from kfoc.kronecker import KroneckerFit, Side, balance, nearest_to_pair, norm_of, opposite
from kfoc.pooling import Optimum, Pooling, Sum, optimum, summed
from kfoc.pooling import largest as largest_of
from kfoc.samples import Samples

if TYPE_CHECKING:
    from kfoc.estimators.kfoc import KFOC


class Aggregation(ABC):
    """The state of one layer: how batches add up to an estimate."""

    def __init__(self, config: KFOC, samples: Samples) -> None:
        self.config = config
        self.report = Report()
        # An empty tensor for dtype and device: the samples themselves must not be kept alive.
        self.like = samples.grads.new_empty(0)
        self.shape = samples.shape
        self.right_shape = samples.right_shape

    # Formed when first needed: a single batch that is solved at once does without sums.
    @cached_property
    def left(self) -> Tensor:
        return self.like.new_zeros(self.shape[0], self.shape[0])

    @cached_property
    def right(self) -> Tensor:
        return self.like.new_zeros(self.right_shape)

    @abstractmethod
    def add(self, samples: Samples, alone: bool) -> None: ...

    @abstractmethod
    def decay(self, factor: float) -> None:
        """Let all that was added so far count `factor` times."""

    @abstractmethod
    def result(self, num_samples: float) -> tuple[Tensor, Tensor]:
        """Left and right, balanced, of the mean Fisher over `num_samples` samples."""

    @abstractmethod
    def pooled(self) -> Pooling[None]:
        """Take in the other ranks' data, see `Estimator.pooled`."""

    def next_pass(self) -> bool:
        """Prepare for another pass; True where none is needed."""
        return True

    def start(self) -> Tensor:
        """The identity as a right factor, whose half step is zero only where F is."""
        ones = self.like.new_ones(self.right_shape[0])
        return ones.diag() if len(self.right_shape) == 2 else ones

    def optimum(self, step: Callable[[Tensor, Side], Tensor], plan: str) -> Pooling[Optimum]:
        """The closest product to a sum over the ranks, of which `step` does this rank's part."""
        found = yield from optimum(step, self.start(), self.config.rtol, self.config.max_steps)
        self.report = Report(None, None, found.steps, found.converged, plan)
        return found

    def merged(self, left: Tensor, right: Tensor, sigma: float) -> Pooling[tuple[Optimum, float]]:
        """The closest product to the sum of the ranks' products, of norm `sigma` each.

        Returns:
            The product, and the factor that it then lacks.
        """
        units = {"left": left / (norm_of(left) or 1.0), "right": right / (norm_of(right) or 1.0)}
        (unit,) = yield from largest_of(sigma)
        share = sigma / (unit or 1.0)

        def step(factor: Tensor, side: Side) -> Tensor:
            return units[opposite(side)] * ((units[side] * factor).sum() * share)

        return (yield from self.optimum(step, "terms")), unit

    def solved(self, samples: Samples) -> KroneckerFit:
        fit = self.config.solve(samples, certify=False)
        converged = self.report.converged and fit.converged
        self.report = Report(None, None, fit.steps, converged, fit.plan)
        return fit

    def solved_alone(self, samples: Samples) -> KroneckerFit:
        """The only batch: its certificate is that of the whole data set."""
        return self._alone(self.solved(samples))

    def _alone(self, fit: KroneckerFit) -> KroneckerFit:
        error = fit.relative_error
        deviation = None if error is None else 0.0
        self.report = Report(error, deviation, fit.steps, fit.converged, fit.plan)
        return fit


class Approx(Aggregation):
    """The paper's K-FOC_approx: factors averaged one by one, `right` at unit norm.

    The paper's Lemma 3.2 puts sigma into one factor and leaves the other at unit norm, and its
    results tell which: a regression net's last layer has a scalar `left`, so that a unit `left`
    would make every average exact, where the paper reports an error of 0.29 for batches of one.
    """

    unit = 0.0  # the scale of `left`, which may leave the range of its dtype

    def add(self, samples: Samples, alone: bool) -> None:
        fit = self.solved_alone(samples) if alone else self.solved(samples)
        root, unit = math.sqrt(fit.sigma), max(self.unit, fit.sigma)
        if root:
            # Both have the norm `root`; the means over batches are weighted by their samples.
            self.left.mul_(self.unit / unit)
            self.left.add_(fit.left, alpha=root / unit * samples.num_samples)
            self.right.add_(fit.right, alpha=samples.num_samples / root)
            self.unit = unit

    def pooled(self) -> Pooling[None]:
        (unit,) = yield from largest_of(self.unit)
        self.left.mul_(self.unit / (unit or 1.0))
        self.unit = unit
        yield [Sum([self.left, self.right])]

    def decay(self, factor: float) -> None:
        self.left.mul_(factor)
        self.right.mul_(factor)

    def result(self, num_samples: float) -> tuple[Tensor, Tensor]:
        norms = self.left.norm().item() * self.right.norm().item() * self.unit
        return balance(self.left, self.right, norms / num_samples**2)


class Running(Aggregation):
    """The paper's K-FOC_running: Algorithm 1 on the estimate so far and the new batch.

    Both are means over samples, weighted by their counts.
    """

    def __init__(self, config: KFOC, samples: Samples) -> None:
        super().__init__(config, samples)
        self.count = 0.0

    def add(self, samples: Samples, alone: bool) -> None:
        fit = self.solved_alone(samples) if alone else self.solved(samples)
        before, self.count = self.count, self.count + samples.num_samples
        if not before:
            self.left, self.right = fit.left, fit.right
            return
        shares = before / self.count, samples.num_samples / self.count
        estimate = self.left, self.right
        merged = nearest_to_pair(estimate, (fit.left, fit.right), shares, in_place=True)
        self.left, self.right = merged

    def pooled(self) -> Pooling[None]:
        """Algorithm 1 on the estimates of all ranks, weighted by their counts."""
        sigma = norm_of(self.left) * norm_of(self.right)
        (total,) = yield from summed(self.count)
        share = self.count / (total or 1.0)
        found, unit = yield from self.merged(self.left, self.right, sigma * share)
        (self.left, self.right), self.count = found.balanced(unit), total

    def decay(self, factor: float) -> None:
        self.count *= factor

    def result(self, num_samples: float) -> tuple[Tensor, Tensor]:
        return self.left, self.right
