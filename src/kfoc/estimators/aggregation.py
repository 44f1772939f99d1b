"""How a layer's batches add up to one Kronecker product: the paper's two ways, batch by batch."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kfoc.blocks import Report
from kfoc.estimators.pooling import Optimum, Pooling, Sum, optimum, summed
from kfoc.estimators.pooling import largest as largest_of
from kfoc.linalg.products import mirrored
from kfoc.linalg.scaling import balance, norm_of
from kfoc.nearest.contraction import Contraction, Side, opposite
from kfoc.nearest.power import KroneckerFit
from kfoc.samples.linear import Samples

if TYPE_CHECKING:
    from kfoc.estimators.kfoc import KFOC


# Factors of so many numbers are formed, and larger ones not: their memory, and the time to write
# to it, would be more than that of the half step which tells their inner products.
FORMED = 2**19


@dataclass
class Term:
    """The optimum of one batch: `sigma` times a product of factors of unit norm, as represented."""

    contraction: Contraction | None  # None: the factors themselves
    factors: dict[Side, Tensor]
    sigma: float
    steps: int
    converged: bool
    plan: str

    def overlap(self, matrix: Tensor, side: Side) -> float:
        """The inner product of a factor with `matrix`, of which `add_to` may have left half."""
        contraction = self._unformed(matrix)
        if matrix.numel() > FORMED and not (contraction and contraction.reads_upper):
            mirrored(matrix)
        if contraction:
            image = contraction.apply(matrix, side)
            return contraction.overlap(self.factors[side], matrix, image, side).item()
        return torch.dot(self._formed(side).flatten(), matrix.flatten()).item()

    def add_to(self, matrix: Tensor, side: Side, share: float) -> None:
        """`matrix += share * factor`; of large ones, on and above the diagonal at least."""
        contraction = self._unformed(matrix)
        if contraction:
            contraction.accumulate(matrix, self.factors[side], side, share)
        else:
            matrix.add_(self._formed(side), alpha=share)

    def _unformed(self, matrix: Tensor) -> Contraction | None:
        """By what a factor of this size is used without being formed, if it can be."""
        implicit = self.contraction is not None and self.contraction.implicit
        return self.contraction if implicit and matrix.numel() > FORMED else None

    def _formed(self, side: Side) -> Tensor:
        factor = self.factors[side]
        return factor if self.contraction is None else self.contraction.factor(factor, side)


class Aggregation(ABC):
    """The state of one layer: how batches add up to an estimate."""

    # All that a state holds, and may hold where it is read from a file; so in the classes below.
    config: KFOC
    report: Report
    like: Tensor
    shape: tuple[int, int]
    right_shape: tuple[int, ...]
    found: tuple[Tensor, Tensor] | None

    def __init__(self, config: KFOC, samples: Samples) -> None:
        self.config = config
        self.report = Report()
        # An empty tensor for dtype and device: the samples themselves must not be kept alive.
        self.like = samples.grads.new_empty(0)
        self.shape = samples.shape
        self.right_shape = samples.right_shape
        self.found = None  # the result, where it is known at once

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

    def optimum_of(self, samples: Samples) -> Term:
        """One batch's optimum of many, with its factors not formed."""
        term = self.config.term(samples)
        converged = self.report.converged and term.converged
        self.report = Report(None, None, term.steps, converged, term.plan)
        return term

    def settle(self, fit: KroneckerFit) -> None:
        self.found = fit.left, fit.right

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

    unit: float = 0.0  # the scale of `left`, which may leave the range of its dtype

    def add(self, samples: Samples, alone: bool) -> None:
        if alone:
            self.settle(self.solved_alone(samples))
            return
        batch = self.optimum_of(samples)
        unit = max(self.unit, batch.sigma)
        if batch.sigma:
            # `right` at unit norm; the means over batches are weighted by their samples.
            if self.unit != unit:
                self.left.mul_(self.unit / unit)
            batch.add_to(self.left, "left", batch.sigma / unit * samples.num_samples)
            batch.add_to(self.right, "right", samples.num_samples)
            self.unit = unit

    def pooled(self) -> Pooling[None]:
        (unit,) = yield from largest_of(self.unit)
        mirrored(self.left).mul_(self.unit / (unit or 1.0))
        self.unit = unit
        yield [Sum([self.left, mirrored(self.right)])]

    def decay(self, factor: float) -> None:
        self.left.mul_(factor)
        self.right.mul_(factor)

    def result(self, num_samples: float) -> tuple[Tensor, Tensor]:
        if self.found is not None:
            return self.found
        left, right = mirrored(self.left), mirrored(self.right)
        norms = norm_of(left) * norm_of(right) * self.unit
        return balance(left, right, norms / num_samples**2)


class Running(Aggregation):
    """The paper's K-FOC_running: Algorithm 1 on the estimate so far and the new batch.

    Both are means over samples, weighted by their counts. The estimate is kept as factors of unit
    norm and their sigma; the batch's factors are added to it without being formed.
    """

    count: float
    sigma: float

    def __init__(self, config: KFOC, samples: Samples) -> None:
        super().__init__(config, samples)
        self.count = 0.0
        self.sigma = 0.0

    def add(self, samples: Samples, alone: bool) -> None:
        if alone:
            self.settle(self.solved_alone(samples))
            return
        batch = self.optimum_of(samples)
        before, self.count = self.count, self.count + samples.num_samples
        old = before / self.count * self.sigma
        new = samples.num_samples / self.count * batch.sigma
        if not old or not new:
            self.sigma = old or new
            if new:
                batch.add_to(self.left.zero_(), "left", 1.0)
                batch.add_to(self.right.zero_(), "right", 1.0)
            return
        cosines = batch.overlap(self.left, "left"), batch.overlap(self.right, "right")
        self.sigma, left_shares, right_shares = combined((old, new), cosines)
        batch.add_to(self.left.mul_(left_shares[0]), "left", left_shares[1])
        batch.add_to(self.right.mul_(right_shares[0]), "right", right_shares[1])

    def pooled(self) -> Pooling[None]:
        """Algorithm 1 on the estimates of all ranks, weighted by their counts."""
        (total,) = yield from summed(self.count)
        share = self.count / (total or 1.0)
        left, right = mirrored(self.left), mirrored(self.right)
        merged, unit = yield from self.merged(left, right, self.sigma * share)
        self.found, self.count = merged.balanced(unit), total

    def decay(self, factor: float) -> None:
        self.count *= factor

    def result(self, num_samples: float) -> tuple[Tensor, Tensor]:
        if self.found is not None:
            return self.found
        return balance(mirrored(self.left), mirrored(self.right), self.sigma)


Pair = tuple[float, float]


def combined(sigmas: Pair, cosines: Pair) -> tuple[float, Pair, Pair]:
    """The Kronecker product closest to the sum of two, of factors of unit norm: Algorithm 1.

    Both factors are combinations of the two terms'. The shares of the left ones, say, are the
    leading eigenvector of the 2 x 2 matrix that two half steps are on them. No number is negative,
    so the result is PSD with the terms.

    Args:
        sigmas: what the two products are multiplied by.
        cosines: inner products of the two left and of the two right factors.

    Returns:
        sigma, and the shares of the two terms in the left and the right factor, of unit norm.
    """
    scale = max(sigmas)
    p, q = sigmas[0] / scale, sigmas[1] / scale
    left, right = (min(max(cosine, 0.0), 1.0) for cosine in cosines)
    # From left shares to right ones, and with the cosines exchanged, back.
    down, up = ((p, p * left), (q * left, q)), ((p, p * right), (q * right, q))
    a, b = (up[0][0] * down[0][k] + up[0][1] * down[1][k] for k in range(2))
    c, d = (up[1][0] * down[0][k] + up[1][1] * down[1][k] for k in range(2))
    half = math.hypot((a - d) / 2, math.sqrt(b * c))
    rise = half + abs(a - d) / 2
    x, y = (rise, c) if a >= d else (b, rise)
    if not x and not y:  # equal, and orthogonal on both sides
        x = 1.0
    norm = _norm(x, y, left)
    x, y = x / norm, y / norm
    u, v = (row[0] * x + row[1] * y for row in down)
    sigma = _norm(u, v, right)
    return sigma * scale, (x, y), (u / sigma, v / sigma)


def _norm(x: float, y: float, cosine: float) -> float:
    """Of x times one and y times another matrix of unit norm."""
    return math.sqrt(x * x + 2 * cosine * x * y + y * y)
