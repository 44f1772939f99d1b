"""How a layer's batches add up to one Kronecker product: what all ways share, and averages."""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import replace
from functools import cached_property
from typing import ClassVar

from torch import Tensor

from kfoc.blocks import Block, KroneckerBlock, KroneckerDiagonalBlock, Report
from kfoc.estimators.base import State
from kfoc.estimators.options import Options
from kfoc.estimators.pooling import Pooling, Sum
from kfoc.estimators.scaled import Scaled
from kfoc.linalg.products import mirrored
from kfoc.linalg.scaling import balance, norm_of
from kfoc.nearest.cone import on_the_cone
from kfoc.nearest.pair import Pieces
from kfoc.nearest.power import KroneckerFit, PowerIteration
from kfoc.nearest.subspace import Singular
from kfoc.samples.linear import Samples


class Aggregation(State):
    """The state of one layer: how batches add up to an estimate.

    Attributes:
        several_passes: whether it takes more passes than one.
        keeps_head: whether it keeps a head between buffers of samples (`kfoc.estimators.head`).
        counts_batches: whether `KFOC(decay=...)` goes with it.
    """

    several_passes: ClassVar[bool] = False
    keeps_head: ClassVar[bool] = False
    counts_batches: ClassVar[bool] = False

    # All that a state holds, and may hold where it is read from a file; so in the classes below.
    config: Options
    report: Report
    like: Tensor
    shape: tuple[int, int]
    right_shape: tuple[int, ...]
    found: tuple[Tensor, Tensor] | None

    def __init__(self, config: Options, samples: Samples) -> None:
        self.config = config
        self.report = Report()
        # An empty tensor for dtype and device: the samples themselves must not be kept alive.
        self.like = samples.grads.new_empty(0)
        self.shape = samples.shape
        self.right_shape = samples.right_shape
        self.found = None  # the result, where it is known at once

    @abstractmethod
    def add(self, samples: Samples, alone: bool) -> None: ...

    @abstractmethod
    def result(self, num_samples: float) -> tuple[Tensor, Tensor]:
        """Left and right, balanced, of the mean Fisher over `num_samples` samples."""

    def block(self, num_samples: float) -> Block:
        left, right = self.result(num_samples)
        kind = KroneckerDiagonalBlock if right.ndim == 1 else KroneckerBlock
        return kind(left, right, report=self.report)

    def of_pair(self, best: Pieces, scale: float) -> tuple[Tensor, Tensor]:
        """Left and right, balanced, of `scale` times the first triple; zeros where there is none.

        Both are positive semi-definite, but for a sign that they have in common, and for what
        merging and the tail add: the closest that are.
        """
        if not len(best):
            return self.like.new_zeros((self.shape[0],) * 2), self.like.new_zeros(self.right_shape)
        left, right = best.lefts[0], best.rights[0]
        if left.trace() < 0:
            left, right = -left, -right
        sigma = best.sigmas[0].item() * scale
        # Sums of the same numbers, above and below the diagonal, may round differently.
        return balance(on_the_cone(mirrored(left)), on_the_cone(mirrored(right)), sigma)

    def solved(self, samples: Samples) -> KroneckerFit:
        fit = self.config.solve(samples, certify=False)
        converged = self.report.converged and fit.converged
        self.report = replace(iterated(fit, fit.plan), converged=converged)
        return fit

    def solve_alone(self, samples: Samples) -> None:
        """The result, of the only batch: its certificate is that of the whole data set."""
        self.settle(self.solved(samples))

    def settle(self, fit: KroneckerFit) -> None:
        """The result, which is final."""
        error = fit.relative_error
        deviation = None if error is None else 0.0
        report = iterated(fit, fit.plan)
        self.report = replace(report, relative_error=error, standard_error=deviation)
        self.found = fit.left, fit.right


class Approx(Scaled, Aggregation):
    """The paper's K-FOC_approx: factors averaged one by one, `right` at unit norm.

    The paper's Lemma 3.2 puts sigma into one factor and leaves the other at unit norm, and its
    results tell which: a regression net's last layer has a scalar `left`, so that a unit `left`
    would make every average exact, where the paper reports an error of 0.29 for batches of one.
    """

    unit: float = 0.0  # of `left` alone: `right` is a sum of matrices of norm one

    # Formed when first needed: a single batch that is solved at once does without sums.
    @cached_property
    def left(self) -> Tensor:
        return self.like.new_zeros(self.shape[0], self.shape[0])

    @cached_property
    def right(self) -> Tensor:
        return self.like.new_zeros(self.right_shape)

    def add(self, samples: Samples, alone: bool) -> None:
        if alone:
            self.solve_alone(samples)
            return
        rescaled, scale = samples.rescaled()  # or factors might vanish where sigma does not
        batch = self.solved(rescaled)
        sigma = batch.sigma * scale
        if sigma:
            # `right` at unit norm; the means over batches are weighted by their samples.
            share = self.room(sigma) * samples.num_samples
            self.left.add_(batch.left, alpha=share / norm_of(batch.left))
            self.right.add_(batch.right, alpha=samples.num_samples / norm_of(batch.right))

    def scale(self, factor: float) -> None:
        self.left.mul_(factor)

    def pooled(self) -> Pooling[None]:
        yield from self.in_common_units()
        yield [Sum(self.totals())]

    def totals(self) -> list[Tensor]:
        return [self.left, self.right]

    def result(self, num_samples: float) -> tuple[Tensor, Tensor]:
        if self.found is not None:
            return self.found
        norms = norm_of(self.left) * norm_of(self.right) * self.unit
        return balance(self.left, self.right, norms / num_samples**2)


def iterated(found: KroneckerFit | Singular | PowerIteration, plan: str) -> Report:
    """What is known of a result from the iteration that found it."""
    gap = found.gap if math.isfinite(found.gap) else None
    return Report(steps=found.steps, converged=found.converged, plan=plan, gap=gap)


def last_change(sigmas: list[float]) -> float | None:
    """How much the last of several passes changed sigma, relatively."""
    if len(sigmas) < 2:
        return None
    return abs(sigmas[-1] - sigmas[-2]) / (sigmas[-1] or 1.0)
