"""Kronecker-factored optimal curvature: the closest Kronecker product to every block."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from kfoc.blocks import Block, KroneckerBlock, KroneckerDiagonalBlock, Report
from kfoc.estimators.factored import FactoredEstimator, factors_bytes
from kfoc.estimators.low_rank import LowRank, numbers_held
from kfoc.kronecker import (
    Contraction,
    KroneckerFit,
    Side,
    balanced,
    nearest_to_pair,
    norm_of,
    opposite,
    settled,
)
from kfoc.memory import Footprint, out_of_memory
from kfoc.planner import PLANS, SINGLE_POSITION, Size, contract, sums_densely
from kfoc.plans import Dense, add_fisher
from kfoc.pooling import Optimum, Pooling, Sum, optimum, summed
from kfoc.pooling import largest as largest_of
from kfoc.products import mirrored
from kfoc.samples import Rows, Samples
from kfoc.solver import fit_contraction
from kfoc.tied import Tied

# Parts of a batch that `online` takes in one by one have so many samples at least: each costs some
# passes over the factors.
LEAST_PART = 256

AGGREGATIONS = ("online", "running", "approx", "exact")


@dataclass(frozen=True)
class KFOC(FactoredEstimator):
    """K-FOC (Schnaus, Lee & Triebel 2021), over any number of batches.

    A single batch gets its optimum under every aggregation. Several are combined by:

    - `"online"` (default): stochastic power iteration, one pass. Every batch adds one half step
      of both factors to two running sums, taken at the sums themselves with this batch's own
      first half step mixed in; memory for two factors (and `buffer`), no inner iteration.
    - `"running"` (paper): each batch is solved, and merged with the estimate so far by
      Algorithm 1 on the two terms, weighted by their sample counts. One pass.
    - `"approx"` (paper): each batch is solved, and the factors are averaged separately, `right`
      at unit norm. One pass.
    - `"exact"`: the optimum of the whole data set: a pass by `"online"`, then one half step of
      the power iteration per pass over the same data, until sigma settles.

    Attributes:
        aggregation: one of the above.
        rtol: estimated relative distance of sigma to its limit at which an iteration stops; 0:
            go on until the factors themselves have settled to rounding.
        max_steps: at most so many half steps when a batch is solved.
        passes: at most so many passes over the data (`"exact"` alone).
        decay: `"online"` alone: each batch scales the sums before it by this number in (0, 1],
            an exponential moving average over batches; None keeps them all.
        buffer: `"online"` and `"exact"`: a layer's samples are collected until they hold so many
            numbers, and taken in as one batch. A data set that fits gets its optimum in one pass,
            and beyond it small batches cost no more than large ones (not with `decay`). A layer of
            several positions whose F has no more numbers than this is summed as F, and gets the
            optimum of any data set. 0 turns both off.
        memory_limit: bytes that a contraction may take for what it keeps between half steps.
        plan: the contraction to use (see `kfoc.planner`); None chooses the cheapest.
        rank: how many Kronecker products to add up. With more than one the blocks are
            `LowRankBlock`s, closer to F and possibly indefinite; see `kfoc.estimators.low_rank`.
            For `"online"` and `"exact"`, without `decay` and `plan`.
    """

    aggregation: str = "online"
    rtol: float = 1e-6
    max_steps: int = 1000
    passes: int = 20
    decay: float | None = None
    buffer: int = 2**19
    memory_limit: int = 2**30
    plan: str | None = None
    rank: int = 1

    def check(self) -> None:
        if self.aggregation not in AGGREGATIONS:
            raise ValueError(
                f"aggregation must be one of {', '.join(AGGREGATIONS)}, found {self.aggregation!r}"
            )
        if self.plan is not None and self.plan not in PLANS:
            raise ValueError(f"plan must be one of {', '.join(PLANS)}, found {self.plan!r}")
        if not self.rtol >= 0:
            raise ValueError(f"rtol must not be negative, found {self.rtol}")
        if self.max_steps < 1 or self.passes < 1:
            raise ValueError(
                f"max_steps and passes must be at least 1, found {self.max_steps} and {self.passes}"
            )
        if self.buffer < 0:
            raise ValueError(f"buffer must not be negative, found {self.buffer}")
        if self.decay is not None and (self.aggregation != "online" or not 0 < self.decay <= 1):
            raise ValueError(
                f'decay must lie in (0, 1] and goes with aggregation="online", found {self.decay} '
                f"with {self.aggregation!r}"
            )
        if self.rank < 1:
            raise ValueError(f"rank must be at least 1, found {self.rank}")
        many = self.rank > 1
        if many and (self.aggregation in ("running", "approx") or self.decay or self.plan):
            raise ValueError(
                f'rank={self.rank} goes with aggregation="online" or "exact", and without decay '
                f"and plan, found {self}"
            )

    @property
    def pass_limit(self) -> int:
        return self.passes if self.aggregation == "exact" else 1

    @property
    def sums_rows(self) -> bool:
        return self.aggregation in ("online", "exact") and self.decay is None

    def init_one(self, layer: str, samples: Samples) -> _Aggregation | LowRank:
        if self.rank > 1 and not samples.diagonal:
            return LowRank(self, samples)
        return _STRATEGIES[self.aggregation](self, samples)

    def footprint_one(self, samples: Samples) -> Footprint:
        factors = factors_bytes(samples)
        if self.rank > 1 and not samples.diagonal:
            held = numbers_held(self, samples) * samples.grads.element_size()
            return Footprint(held, self.rank * factors)
        if self.aggregation not in ("online", "exact"):
            return Footprint(factors, factors)
        # What is pending, or F in its place, beside the sums; tokens may be the wider numbers.
        inputs = samples.embedding.inputs if isinstance(samples, Tied) else samples.inputs
        each = max(samples.grads.element_size(), inputs.tensor.element_size())
        return Footprint(factors + self.buffer * each, factors)

    def update_one(
        self, state: _Aggregation | LowRank, samples: Samples, *, alone: bool
    ) -> _Aggregation | LowRank:
        state.add(samples, alone)
        return state

    def next_pass_one(self, state: _Aggregation | LowRank) -> tuple[_Aggregation | LowRank, bool]:
        return state, state.next_pass()

    def streaming(self) -> KFOC:
        # Without the buffer, whose samples would have to be taken in at once at every decay.
        online = self.aggregation == "online" and self.rank == 1
        return replace(self, decay=1.0) if online else self

    def decayed_one(self, state: _Aggregation | LowRank, factor: float) -> _Aggregation | LowRank:
        if isinstance(state, LowRank):
            return super().decayed_one(state, factor)
        state.decay(factor)
        return state

    def pooled_one(self, state: _Aggregation | LowRank) -> Pooling[_Aggregation | LowRank]:
        if self.decay is not None:
            raise ValueError(
                f"decay={self.decay} counts batches one after the other, and ranks have theirs at "
                "the same time: leave out decay or group=..."
            )
        yield from state.pooled()
        return state

    def change_one(self, state: _Aggregation | LowRank) -> float | None:
        if isinstance(state, LowRank):
            sigmas = state.norms
        else:
            sigmas = state.sigmas if isinstance(state, _Exact) else []
        if len(sigmas) < 2:
            return None
        return abs(sigmas[-1] - sigmas[-2]) / (sigmas[-1] or 1.0)

    def finish_one(self, state: _Aggregation | LowRank, num_samples: float) -> Block:
        if isinstance(state, LowRank):
            return state.block(num_samples)
        left, right = state.result(num_samples)
        kind = KroneckerDiagonalBlock if right.ndim == 1 else KroneckerBlock
        return kind(left, right, report=state.report)

    def solve(self, samples: Samples, *, certify: bool) -> KroneckerFit:
        """The optimum of one batch, of the mean over its samples.

        Where memory does not suffice for the planned contraction, by one that keeps nothing.
        """
        try:
            return self._solved(samples, certify)
        except (RuntimeError, MemoryError) as error:
            if self.plan or not self.memory_limit or not out_of_memory(error):
                raise
        return replace(self, memory_limit=0)._solved(samples, certify)

    def _solved(self, samples: Samples, certify: bool) -> KroneckerFit:
        contraction, scale = self.contraction(samples)
        return fit_contraction(
            contraction,
            rtol=self.rtol,
            max_steps=self.max_steps,
            certify=certify or contraction.certifies,
            scale=scale / samples.num_samples,
        )

    def contraction(self, samples: Samples) -> tuple[Contraction, float]:
        """The planned contraction of the rescaled samples, and the factor that it then lacks."""
        rescaled, scale = samples.rescaled()
        return contract(rescaled, self.memory_limit, self.plan), scale


class _Aggregation(ABC):
    """The state of one layer: how batches add up to an estimate."""

    def __init__(self, config: KFOC, samples: Samples) -> None:
        self.config = config
        self.report = Report()
        # An empty tensor for dtype and device: the samples themselves must not be kept alive.
        self._like = samples.grads.new_empty(0)
        self._shape = samples.shape
        self._right_shape = samples.right_shape

    # Formed when first needed: a single batch that is solved at once does without sums.
    @cached_property
    def left(self) -> Tensor:
        return self._like.new_zeros(self._shape[0], self._shape[0])

    @cached_property
    def right(self) -> Tensor:
        return self._like.new_zeros(self._right_shape)

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

    def optimum(self, step: Callable[[Tensor, Side], Tensor], plan: str) -> Pooling[Optimum]:
        """The closest product to a sum over the ranks, of which `step` does this rank's part."""
        size, many = self._right_shape[0], len(self._right_shape) == 2
        start = self._like.new_ones(size).diag() if many else self._like.new_ones(size)
        found = yield from optimum(step, start, self.config.rtol, self.config.max_steps)
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


class _Approx(_Aggregation):
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
        return balanced(self.left, self.right, norms / num_samples**2)


class _Running(_Aggregation):
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
        merged = nearest_to_pair((self.left, self.right), (fit.left, fit.right), shares)
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


class _Online(_Aggregation):
    """Stochastic power iteration, with one predicted half step and the scale of a sketch.

    `left_sum` collects `A_b r_b` and `right_sum` collects `A_b^T l_b` over batches b, where l_b
    and r_b are the normalised sums, including this batch's own contribution at the previous
    factors (the prediction): without it, a batch is weighted by directions that have never seen
    it, which on heavy-tailed gradients costs up to 0.1 of relative error.

    `core` collects `<A_b, l_b r_b^T>`. The sums are two sketches of A, and the rank-one
    approximation that they and the core determine is `left_sum right_sum^T / core` (a generalised
    Nystrom approximation): its scale is right to second order in the errors of l_b and r_b, where
    that of either sum alone is so to first order.
    """

    def __init__(self, config: KFOC, samples: Samples) -> None:
        super().__init__(config, samples)
        self.core = 0.0
        self.norms = 0.0, 0.0  # of the sums, which are kept on and above the diagonal alone
        self.weight = 0.0  # samples in the sums, decayed as they are
        self.unit = 0.0  # the scale of all sums: they would overflow at extreme gradients
        self.pending: list[Samples] = []
        self.buffer = 0 if config.decay else config.buffer
        self.single: KroneckerFit | None = None
        self.fisher: Tensor | None = None  # of layers small enough: F itself
        if not samples.diagonal and sums_densely(Size.of(samples), config.buffer):
            o, i = samples.shape
            self.fisher = samples.grads.new_zeros(o * i, o * i)

    def add(self, samples: Samples, alone: bool) -> None:
        if alone:
            self.single = self.solved_alone(samples)
            return
        if self.fisher is not None:
            rescaled, scale = samples.rescaled()
            self._weigh(samples, scale)
            add_fisher(self.fisher, rescaled, scale / (self.unit or 1.0))
            return
        held = sum(part.numel for part in self.pending)
        if self.pending and (
            held + samples.numel > self.buffer or not self.pending[0].joins(samples)
        ):
            self.flush()
        if samples.numel > self.buffer:
            self.take(samples)
        else:
            self.pending.append(samples.detached_copy())

    def flush(self) -> None:
        """Take in what is pending."""
        pending, self.pending = self.pending, []
        if pending:
            self.take(pending[0].merged(pending))

    def take(self, samples: Samples) -> None:
        """Absorb a batch, in parts where that is cheaper: inner products grow with its square."""
        count, parts = samples.num_samples, 1
        if samples.num_positions == 1 and not self.config.decay:  # which counts batches
            o, i = samples.shape
            parts = math.ceil(count / max(LEAST_PART, (o * o + i * i) // (3 * (o + i))))
        part = math.ceil(count / parts) if count else 1
        for start in range(0, count, part):
            self.absorb(samples.part(start, start + part))

    def close(self) -> None:
        """Take in what is pending at the end; if that is all there was, it is the optimum."""
        if self.fisher is not None and self.weight and self.single is None:
            contraction = Dense.of(self.fisher, self._shape)
            self.single = self._alone(
                fit_contraction(
                    contraction,
                    rtol=self.config.rtol,
                    max_steps=self.config.max_steps,
                    scale=self.unit / self.weight,
                )
            )
        if self.pending and not self.weight:
            self.single = self.solved_alone(self.pending[0].merged(self.pending))
            self.pending = []
        self.flush()

    def absorb(self, samples: Samples) -> None:
        contraction, scale = self.config.contraction(samples)
        self.report = replace(self.report, plan=contraction.plan)
        self._weigh(samples, scale)
        self._step(contraction, scale / (self.unit or 1.0))

    def _weigh(self, samples: Samples, scale: float) -> None:
        """Make room for one more batch: the decay, and the scale that all sums are in."""
        decay = self.config.decay or 1.0
        self._rescale(scale, decay)
        self.weight = decay * self.weight + samples.num_samples

    def _rescale(self, scale: float, decay: float) -> None:
        unit = max(self.unit, scale)
        if not unit:  # zeros alone, so far
            return
        factor = decay * self.unit / unit
        if self.fisher is not None:
            self.fisher *= factor
        elif factor != 1.0:
            self.left *= factor
            self.right *= factor
            self.core *= factor
            self.norms = self.norms[0] * factor, self.norms[1] * factor
        self.unit = unit

    def _step(self, contraction: Contraction, c: float) -> None:
        """Add this batch, whose part of A is `c` times the contraction.

        A is linear, so the corrected half steps are combinations of those from the sums and from
        the predictions: the factors are formed once, at the end.
        """
        left, right, (left_norm, right_norm) = self.left, self.right, self.norms
        if not contraction.reads_upper:
            mirrored(left)
            mirrored(right)
        if left_norm and right_norm:
            w = contraction.apply(right, "right") / right_norm  # A r, a left representation
            v = contraction.apply(left, "left") / left_norm  # A^T l, a right representation
        else:
            w, v = _started(contraction)
        left_image, right_image = v * left_norm, w * right_norm

        # The norms of the predictions `sum + c * step`, without forming the steps' factors. A
        # batch without any gradient, met first, has none: it then divides zeros by one.
        squared = right_norm**2
        squared += 2 * c * contraction.overlap(v, right, right_image, "right").item()
        squared += c * c * contraction.inner(v, v, "right").item()
        right_after = math.sqrt(max(squared, 0.0)) or 1.0
        w_after = (right_image + contraction.advance(v, "right") * c) / right_after

        squared = left_norm**2
        squared += 2 * c * contraction.overlap(w, left, left_image, "left").item()
        squared += c * c * contraction.inner(w, w, "left").item()
        left_after = math.sqrt(max(squared, 0.0)) or 1.0
        v_after = (left_image + contraction.advance(w, "left") * c) / left_after

        # Before anything asks for another image, which the plans keep the last of alone.
        core = c * c * contraction.inner(w_after, w, "left").item()
        left_overlap = c * contraction.overlap(w_after, left, left_image, "left").item()
        self.core += (core + left_overlap) / left_after
        squared = left_norm**2 + 2 * left_overlap
        squared += c * c * contraction.inner(w_after, w_after, "left").item()
        left_norm = math.sqrt(max(squared, 0.0))
        squared = right_norm**2
        squared += 2 * c * contraction.overlap(v_after, right, right_image, "right").item()
        squared += c * c * contraction.inner(v_after, v_after, "right").item()
        self.norms = left_norm, math.sqrt(max(squared, 0.0))
        contraction.accumulate(left, w_after, "left", c)
        contraction.accumulate(right, v_after, "right", c)

    def pooled(self) -> Pooling[None]:
        yield from self._pooled_kind()
        if self.fisher is not None:
            yield from self._pooled_unit()
            yield [Sum([self.fisher])]
            (self.weight,) = yield from summed(self.weight)
            return
        (absorbed,) = yield from largest_of(self.weight)
        if absorbed:
            self.flush()
            yield from self._pooled_sums()
        else:
            yield from self._pooled_pending()

    def _pooled_kind(self) -> Pooling[None]:
        """Sum F itself on all ranks or on none: each has decided by the size of its first batch."""
        seen = self.unit > 0 or any(samples.numel for samples in self.pending)
        dense, factored = yield from largest_of(
            self.fisher is not None, self.fisher is None and seen
        )
        if not dense or (not factored and self.fisher is not None):
            return
        if self.fisher is None and not factored:
            o, i = self._shape
            self.fisher = self._like.new_zeros(o * i, o * i)
            self.weight += sum(samples.num_samples for samples in self.pending)
            self.pending = []
        elif self.fisher is not None:
            contraction = Dense.of(self.fisher, self._shape)
            self.fisher = None
            if self.unit:
                self._step(contraction, 1.0)

    def _pooled_unit(self) -> Pooling[None]:
        (unit,) = yield from largest_of(self.unit)
        self._rescale(unit, 1.0)

    def _pooled_sums(self) -> Pooling[None]:
        """The closest product to the sum of the ranks' estimates: Algorithm 1, as half steps.

        To add up the sums instead does not gain anything: each rank's are taken at directions of
        its own, which differ most where the ranks have different classes.
        """
        mirrored(self.left)
        mirrored(self.right)
        found, unit = yield from self.merged(self.left, self.right, self._sigma())
        (self.weight,) = yield from summed(self.weight)
        self.left, self.right, self.unit = found.left, found.right, unit
        self.norms = norm_of(self.left), norm_of(self.right)
        # Of the two norms one is sigma and the other one: so the estimate is their product.
        self.core = self.norms[0] * self.norms[1] / found.sigma if found.sigma else 0.0

    def _sigma(self) -> float:
        """The norm of the estimate of the sum over samples."""
        norms = self.left.norm().item() * self.right.norm().item()
        return norms / self.core * self.unit if self.core else 0.0

    def _pooled_pending(self) -> Pooling[None]:
        """The optimum of what the ranks have pending, which is all there is."""
        pending, self.pending = self.pending, []
        count = sum(samples.num_samples for samples in pending)
        contraction, scale = None, 0.0
        if count:
            contraction, scale = self.config.contraction(pending[0].merged(pending))
        (unit,) = yield from largest_of(scale)
        (self.weight,) = yield from summed(count)
        if not unit:
            return

        def step(factor: Tensor, side: Side) -> Tensor:
            shape = self._right_shape if side == "left" else self._shape[:1] * 2
            image = self._like.new_zeros(shape)
            if contraction is not None:
                steps = contraction.apply(factor, side)
                contraction.accumulate(image, steps, opposite(side), scale / unit)
            return mirrored(image)

        found = yield from self.optimum(step, "ranks")
        scale = unit / self.weight
        left, right = found.balanced(scale)
        self.single = KroneckerFit(
            left, right, found.sigma * scale, None, found.steps, found.converged, "ranks"
        )

    def decay(self, factor: float) -> None:
        self.flush()
        if self.unit:
            self._rescale(0.0, factor)
        self.weight *= factor

    def result(self, num_samples: float) -> tuple[Tensor, Tensor]:
        self.close()
        if self.single is not None:
            return self.single.left, self.single.right
        left, right = mirrored(self.left), mirrored(self.right)
        if not self.core:
            return left, right
        norms = left.norm().item() * right.norm().item()
        return balanced(left, right, norms / self.core * self.unit / self.weight)


def _started(contraction: Contraction) -> tuple[Tensor, Tensor]:
    """The first batch's `A r` and `A^T l`, one full step from the deterministic start."""
    start = contraction.start()
    v = contraction.advance(start, "left")
    norm = math.sqrt(max(contraction.inner(v, v, "right").item(), 0.0)) or 1.0
    return contraction.advance(v, "right") / norm, v / norm


class _Exact(_Online):
    """The power iteration over the whole data set, one half step per pass, after an online pass."""

    def __init__(self, config: KFOC, samples: Samples) -> None:
        super().__init__(config, samples)
        self.side: Side | None = None  # of the factor that is held fixed in this pass
        self.sigmas: list[float] = []

    def absorb(self, samples: Samples) -> None:
        if self.side is None:
            super().absorb(samples)
            return
        contraction, scale = self.config.contraction(samples)
        fixed, image = self._factors(self.side)
        step = contraction.apply(fixed, self.side)
        contraction.accumulate(image, step, opposite(self.side), scale / (self.unit or 1.0))

    def pooled(self) -> Pooling[None]:
        if self.side is None:
            yield from super().pooled()
        else:
            self.flush()
            _, image = self._factors(self.side)
            yield [Sum([mirrored(image)])]

    def next_pass(self) -> bool:
        self.close()
        if self.single is not None or (self.side is None and not self.core):
            return True
        if self.side is None:
            mirrored(self.left)
            self.left /= self.left.norm()
            self._fix("left")
            return False
        _, image = self._factors(self.side)
        mirrored(image)
        self.sigmas.append(image.norm().item())
        precision = 4 * torch.finfo(image.dtype).eps
        converged = settled(self.sigmas, self.config.rtol, precision)
        plan = self.report.plan
        self.report = Report(None, None, len(self.sigmas), converged, plan)
        if not converged and len(self.sigmas) + 1 < self.config.passes:
            image /= self.sigmas[-1] or 1.0
            self._fix(opposite(self.side))
            return False
        return True

    def _factors(self, side: Side) -> tuple[Tensor, Tensor]:
        return (self.left, self.right) if side == "left" else (self.right, self.left)

    def _fix(self, side: Side) -> None:
        self.side = side
        self._factors(side)[1].zero_()

    def result(self, num_samples: float) -> tuple[Tensor, Tensor]:
        if not self.sigmas:
            return super().result(num_samples)
        return balanced(self.left, self.right, self.sigmas[-1] * self.unit / num_samples)


_STRATEGIES: dict[str, Callable[[KFOC, Samples], _Aggregation]] = {
    "approx": _Approx,
    "running": _Running,
    "online": _Online,
    "exact": _Exact,
}


def nearest_kronecker_of_samples(
    inputs: Tensor,
    grads: Tensor,
    *,
    rtol: float = 1e-6,
    max_steps: int = 1000,
    plan: str | None = None,
    memory_limit: int = 2**30,
) -> KroneckerFit:
    """The Kronecker product closest to the mean Fisher block of a layer's samples.

    Algorithm 2 of Schnaus, Lee & Triebel (2021): `F = (1/N) sum_{s,n} vec(X) vec(X)^T` with the
    per-sample gradients `X[s, n] = sum_t grads[s,n,t] inputs[n,t]^T`, `vec` row-major.

    Args:
        inputs: a, (N, T, i); for a layer with bias, with a last column of ones.
        grads: g, (S, N, T, o), or (N, T, o) for one direction.
        rtol: estimated relative distance of sigma to its limit at which to stop.
        max_steps: at most so many half steps; `converged` tells whether they sufficed.
        plan: "gram" or "primal" (both for T = 1), "position_gram", "positions", "gradients" or
            "dense"; None: the one with the fewest multiply-adds that fits the memory.
        memory_limit: bytes that the contraction may keep between half steps.

    Returns:
        The factors (o, o) and (i, i), symmetric and PSD, with sigma and the relative error.

    Raises:
        ValueError: shapes, dtypes or options that do not fit, or values that are not finite.
    """
    config = KFOC(rtol=rtol, max_steps=max_steps, plan=plan, memory_limit=memory_limit)
    config.check()
    samples = _checked_samples(inputs, grads)
    if plan in SINGLE_POSITION and samples.num_positions != 1:
        raise ValueError(
            f"plan {plan!r} is for inputs with one position, found T = {samples.num_positions}"
        )
    return config.solve(samples, certify=True)


def _checked_samples(inputs: Tensor, grads: Tensor) -> Samples:
    grads = grads[None] if grads.ndim == 3 else grads
    if inputs.ndim != 3 or grads.ndim != 4 or inputs.shape[:2] != grads.shape[1:3]:
        raise ValueError(
            "inputs must be (N, T, i) and grads (S, N, T, o) with the same N and T, found "
            f"{tuple(inputs.shape)} and {tuple(grads.shape)}"
        )
    if 0 in inputs.shape or 0 in grads.shape:
        raise ValueError(f"inputs and grads must not be empty, found {tuple(grads.shape)}")
    if not inputs.is_floating_point() or inputs.dtype != grads.dtype:
        raise ValueError(
            f"inputs and grads must share a floating-point dtype, found {inputs.dtype} and "
            f"{grads.dtype}"
        )
    samples = Samples(Rows(inputs), grads)
    for name, largest in zip(("inputs", "grads"), samples.magnitudes, strict=True):
        if not math.isfinite(largest):
            raise ValueError(f"{name} has values that are not finite ({largest})")
    return samples
