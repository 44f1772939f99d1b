"""Kronecker-factored optimal curvature: the closest Kronecker product to every block."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeVar

from torch import Tensor

from kfoc.blocks import Block, KroneckerBlock, KroneckerDiagonalBlock
from kfoc.common.ambient import plainly
from kfoc.common.arguments import whole
from kfoc.errors import Footprint, out_of_memory
from kfoc.estimators import single_output
from kfoc.estimators.aggregation import Aggregation, Approx, Running, Term
from kfoc.estimators.factored import FactoredEstimator, factors_bytes
from kfoc.estimators.low_rank import LowRank, numbers_held
from kfoc.estimators.online import Exact, Online
from kfoc.estimators.over_ranks import synchronised
from kfoc.estimators.pooling import Pooling
from kfoc.linalg.scaling import balance, check_representable
from kfoc.nearest.accelerated import fit_contraction, leading_pair
from kfoc.nearest.contraction import Contraction, Side
from kfoc.nearest.power import KroneckerFit
from kfoc.plans.choose import PLANS, SINGLE_POSITION, contract, sketch_rank
from kfoc.plans.cost import Size
from kfoc.plans.sketch import Sketchable, fit_from_sketch
from kfoc.samples.inputs import Rows
from kfoc.samples.linear import Samples
from kfoc.samples.tied import Tied

T = TypeVar("T")

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
        plan: the contraction to use (see `kfoc.plans.choose`); None chooses the cheapest.
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
        for name in ("max_steps", "passes", "rank"):
            whole(name, getattr(self, name), 1)
        for name in ("buffer", "memory_limit"):
            whole(name, getattr(self, name), 0)
        if self.decay is not None and (self.aggregation != "online" or not 0 < self.decay <= 1):
            raise ValueError(
                f'decay must lie in (0, 1] and goes with aggregation="online", found {self.decay} '
                f"with {self.aggregation!r}"
            )
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

    def init_one(self, layer: str, samples: Samples) -> Aggregation | LowRank:
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
        self, state: Aggregation | LowRank, samples: Samples, *, alone: bool
    ) -> Aggregation | LowRank:
        state.add(samples, alone)
        return state

    def next_pass_one(self, state: Aggregation | LowRank) -> tuple[Aggregation | LowRank, bool]:
        return state, state.next_pass()

    def streaming(self) -> KFOC:
        # Without the buffer, whose samples would have to be taken in at once at every decay.
        online = self.aggregation == "online" and self.rank == 1
        return replace(self, decay=1.0) if online else self

    def decayed_one(self, state: Aggregation | LowRank, factor: float) -> Aggregation | LowRank:
        if isinstance(state, LowRank):
            return super().decayed_one(state, factor)
        state.decay(factor)
        return state

    def pooled_one(self, state: Aggregation | LowRank) -> Pooling[Aggregation | LowRank]:
        if self.decay is not None:
            raise ValueError(
                f"decay={self.decay} counts batches one after the other, and ranks have theirs at "
                "the same time: leave out decay or group=..."
            )
        yield from state.pooled()
        return state

    def shared_one(self, state: Aggregation | LowRank) -> None:
        if isinstance(state, Online):
            state.waits = True

    def due_one(self, state: Aggregation | LowRank) -> bool:
        return isinstance(state, Online) and state.due

    def synchronised_one(self, state: Aggregation | LowRank) -> Pooling[None]:
        if isinstance(state, Online):
            yield from synchronised(state)

    def change_one(self, state: Aggregation | LowRank) -> float | None:
        if isinstance(state, LowRank):
            sigmas = state.norms
        else:
            sigmas = state.sigmas if isinstance(state, Exact) else []
        if len(sigmas) < 2:
            return None
        return abs(sigmas[-1] - sigmas[-2]) / (sigmas[-1] or 1.0)

    def finish_one(self, state: Aggregation | LowRank, num_samples: float) -> Block:
        if isinstance(state, LowRank):
            return state.block(num_samples)
        left, right = state.result(num_samples)
        kind = KroneckerDiagonalBlock if right.ndim == 1 else KroneckerBlock
        return kind(left, right, report=state.report)

    def solve(self, samples: Samples, *, certify: bool) -> KroneckerFit:
        """The optimum of one batch, of the mean over its samples.

        Where memory does not suffice for the planned contraction, by one that keeps nothing.
        """
        return self._within_memory(lambda config: config._solved(samples, certify))

    def _within_memory(self, solve: Callable[[KFOC], T]) -> T:
        try:
            return solve(self)
        except (RuntimeError, MemoryError) as error:
            if self.plan or not self.memory_limit or not out_of_memory(error):
                raise
        return solve(replace(self, memory_limit=0))

    def _solved(self, samples: Samples, certify: bool) -> KroneckerFit:
        if samples.shape[0] == 1 and not samples.diagonal and self.plan is None:
            return single_output.solved(samples)
        contraction, scale = self.contraction(samples)
        return self._contracted(samples, contraction, scale / samples.num_samples, certify)

    def _contracted(
        self, samples: Samples, contraction: Contraction, scale: float, certify: bool
    ) -> KroneckerFit:
        rank = self._sketch_rank(samples, contraction)
        if rank and isinstance(contraction, Sketchable):
            return fit_from_sketch(
                contraction,
                samples.shape,
                rank,
                rtol=self.rtol,
                max_steps=self.max_steps,
                certify=certify,
                scale=scale,
            )
        return fit_contraction(
            contraction,
            rtol=self.rtol,
            max_steps=self.max_steps,
            certify=certify or contraction.certifies,
            scale=scale,
        )

    def _sketch_rank(self, samples: Samples, contraction: Contraction) -> int:
        """See `planner.sketch_rank`; 0 too where tolerance and steps leave no room for a start that
        is only nearly the optimum."""
        if isinstance(samples, Tied) or samples.diagonal or self.rtol < 1e-8 or self.max_steps < 20:
            return 0
        element_size = samples.grads.element_size()
        return sketch_rank(Size.of(samples), contraction.plan, self.memory_limit, element_size)

    def term(self, samples: Samples) -> Term:
        """As `solve`, without forming the factors where that can be had."""
        return self._within_memory(lambda config: config._term(samples))

    def _term(self, samples: Samples) -> Term:
        contraction, scale = self.contraction(samples)
        scale /= samples.num_samples
        factors: dict[Side, Tensor]
        if self._sketch_rank(samples, contraction):
            fit = self._contracted(samples, contraction, scale, certify=False)
            left, right = balance(fit.left, fit.right, 1.0)
            factors = {"left": left, "right": right}
            return Term(None, factors, fit.sigma, fit.steps, fit.converged, fit.plan)
        found = leading_pair(contraction, self.rtol, self.max_steps)
        # Both of unit norm, and zeros where F is.
        scales = found.scales(1.0)
        factors = {"left": found.left * scales[0], "right": found.right * scales[1]}
        sigma = found.sigma * scale
        return Term(contraction, factors, sigma, found.steps, found.converged, contraction.plan)

    def contraction(self, samples: Samples) -> tuple[Contraction, float]:
        """The planned contraction of the rescaled samples, and the factor that it then lacks."""
        rescaled, scale = samples.rescaled()
        return contract(rescaled, self.memory_limit, self.plan), scale


_STRATEGIES: dict[str, Callable[[KFOC, Samples], Aggregation]] = {
    "approx": Approx,
    "running": Running,
    "online": Online,
    "exact": Exact,
}


@plainly
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
        The factors (o, o) and (i, i), symmetric and PSD, with sigma and the relative error; in
        float32 at least.

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
    fit = config.solve(samples, certify=True)
    check_representable(math.sqrt(fit.sigma), grads.dtype, "the Kronecker product")
    return fit


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
    if inputs.element_size() < 4:  # half precision squares to nothing
        inputs, grads = inputs.float(), grads.float()
    samples = Samples(Rows(inputs), grads)
    for name, largest in zip(("inputs", "grads"), samples.magnitudes, strict=True):
        if not math.isfinite(largest):
            raise ValueError(f"{name} has values that are not finite ({largest})")
    return samples
