"""Kronecker-factored optimal curvature: the closest Kronecker product to every block."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import Tensor

from kfoc.common.ambient import plainly
from kfoc.common.arguments import one_of, whole
from kfoc.errors import Footprint
from kfoc.estimators.aggregation import Aggregation, Approx
from kfoc.estimators.exact import Exact
from kfoc.estimators.factored import FactoredEstimator, factors_bytes
from kfoc.estimators.online import Online
from kfoc.estimators.options import Options
from kfoc.estimators.running import Running
from kfoc.estimators.sums import ExactSums, Sums
from kfoc.linalg.scaling import check_representable, wide
from kfoc.nearest.power import KroneckerFit
from kfoc.parameters.layout import Layout
from kfoc.plans.choose import PLANS
from kfoc.samples.inputs import Rows
from kfoc.samples.linear import Samples
from kfoc.samples.one_hot import FULL_VOCABULARY
from kfoc.samples.tied import Tied

# Bytes of a sigma in float64, and of one beside all of them.
SIGMA = 16

# An aggregation of one's own goes in here.
AGGREGATIONS: dict[str, type[Aggregation]] = {
    "online": Online,
    "running": Running,
    "approx": Approx,
    "exact": Exact,
}
# Those of sums of several products.
OF_SUMS: dict[str, type[Aggregation]] = {"online": Sums, "exact": ExactSums}


@dataclass(frozen=True)
class KFOC(Options, FactoredEstimator):
    """K-FOC (Schnaus, Lee & Triebel 2021), over any number of batches.

    The better matrix than K-FAC in every case of docs/study.md, and most where weights are shared
    over positions (convolutions, tokens, attention). To invert it there, take it with a damping
    that is not much below the weight decay, or better `EigenCorrected(KFOC())`, or a few products
    with the true Fisher (`kfoc.Fisher`); with an MLP, K-FAC inverts as well. Continual learning and
    pruning gain nothing from it.

    A single batch gets its optimum, within `rtol`, under every aggregation. Several are combined
    by:

    - `"online"` (default): one pass. The leading singular triples of all batches so far are kept
      (the head), each buffer's are merged with them in closed form, and of what that leaves out
      the half steps are summed at the best pair (the tail); see `kfoc.estimators.head`. Within
      some thousandths of the optimum, for any size and order of batches and number of ranks
      (docs/choosing.md); memory for `head + 1` pairs of factors, and `buffer`.
    - `"running"` (paper): each batch is solved, and merged with the estimate so far by
      Algorithm 1 on the two terms, weighted by their sample counts. One pass.
    - `"approx"` (paper): each batch is solved, and the factors are averaged separately, `right`
      at unit norm. One pass.
    - `"exact"`: the optimum of the whole data set: a pass by `"online"`, then one half step of
      the power iteration per pass over the same data, until sigma settles.

    Attributes:
        aggregation: one of the above.
        rtol: an iteration stops at this relative distance of sigma to its limit, as estimated
            (`report.gap` is what was left); 0: when the factors themselves have settled to
            rounding. None: when the block's relative error is within 1e-4 of the optimum's.
        max_steps: at most so many half steps when a batch is solved.
        passes: at most so many passes over the data (`"exact"` alone).
        decay: `"online"` alone: each batch scales the sums before it by this number in (0, 1],
            an exponential moving average over batches; None keeps them all.
        head: `"online"` and `"exact"`: how many singular triples are kept between buffers, a pair
            of factors each. None: 4 (`2 * rank + 4` of a sum), or for models of large layers as
            many as `head_memory` allows: 3, 2, 1 or none, the tail alone, the farther from the
            optimum the fewer they are (a block's report says how many). At least `rank`, of a sum.
        head_memory: bytes that all layers' heads may take together, where `head` is None.
        buffer: `"online"` and `"exact"`: a layer's samples are collected until they hold so many
            numbers, and taken in as one batch. A data set that fits gets its optimum in one pass,
            and beyond it small batches cost no more than large ones (not with `decay`). A layer of
            several positions whose F has no more numbers than this is summed as F, and gets the
            optimum of any data set. 0 turns both off.
        memory_limit: bytes that a contraction may take for what it keeps between half steps.
        plan: the contraction to use (see `kfoc.plans.choose`); None chooses the cheapest.
        rank: how many Kronecker products to add up. With more than one the blocks are
            `LowRankBlock`s, closer to F and possibly indefinite; see `kfoc.estimators.sums`.
            For `"online"` and `"exact"`, without `plan`.
    """

    def check(self) -> None:
        one_of("aggregation", self.aggregation, AGGREGATIONS)
        if self.plan is not None:
            one_of("plan", self.plan, PLANS)
        if self.rtol is not None and not self.rtol >= 0:
            raise ValueError(f"rtol must not be negative, found {self.rtol}")
        for name in ("max_steps", "passes", "rank"):
            whole(name, getattr(self, name), 1)
        for name in ("buffer", "memory_limit", "head_memory"):
            whole(name, getattr(self, name), 0)
        if self.head is not None:
            whole("head", self.head, self.rank if self.rank > 1 else 0)
        counts = self._kind.counts_batches
        if self.decay is not None and not (counts and 0 < self.decay <= 1):
            raise ValueError(
                f'decay must lie in (0, 1] and goes with aggregation="online", found {self.decay} '
                f"with {self.aggregation!r}"
            )
        if self.rank > 1 and (self.aggregation not in OF_SUMS or self.plan):
            raise ValueError(
                f'rank={self.rank} goes with aggregation="online" or "exact", and without plan, '
                f"found {self}"
            )

    @property
    def _kind(self) -> type[Aggregation]:
        return AGGREGATIONS[self.aggregation]

    @property
    def pass_limit(self) -> int:
        return self.passes if self._kind.several_passes else 1

    @property
    def sums_rows(self) -> bool:
        return self._kind.keeps_head and self.decay is None

    def sized(self, layouts: Mapping[str, Layout]) -> KFOC:
        if self.head is not None or not self._kind.keeps_head:
            return self
        pairs = sum(map(_pair_numbers, layouts.values())) * 4
        least = self.rank if self.rank > 1 else 0
        fitting = self.head_memory // max(1, pairs)
        return replace(self, head=max(least, min(self.head_size, fitting)))

    def begin_one(self, layer: str, samples: Samples) -> Aggregation:
        several = self.rank > 1 and not samples.diagonal
        return (OF_SUMS if several else AGGREGATIONS)[self.aggregation](self, samples)

    def footprint_one(self, samples: Samples) -> Footprint:
        factors = factors_bytes(samples)
        several = self.rank > 1 and not samples.diagonal
        block = factors * (self.rank if several else 1)
        if not self._kind.keeps_head:
            return Footprint(factors + SIGMA, factors)
        pairs = self.head_size + 1
        if (Sums if several else Online).sums_fisher(self, samples):
            pairs = 0
        # Between the passes of "exact", what is held fixed and its images.
        if self._kind.several_passes:
            pairs = max(pairs, 2 * self.columns if several else 1)
        # What is pending, or F in its place, beside the sums; tokens may be the wider numbers.
        inputs = samples.embedding.inputs if isinstance(samples, Tied) else samples.inputs
        each = max(samples.grads.element_size(), inputs.tensor.element_size())
        return Footprint(pairs * (factors + SIGMA) + self.buffer * each, block)

    def streaming(self) -> KFOC:
        # Without the buffer, whose samples would have to be taken in at once at every decay.
        return replace(self, decay=1.0) if self._kind.counts_batches else self


def _pair_numbers(layout: Layout) -> int:
    """Of a pair of factors of a layer, all its groups together; an upper bound."""
    if layout.kind in ("stacked", "flat"):
        return 0
    groups, (o, i) = layout.groups, layout.shape
    inputs = i if layout.kind == "columns" and i > FULL_VOCABULARY else i * i
    return groups * ((o // groups) ** 2 + inputs)


@plainly
def nearest_kronecker_of_samples(
    inputs: Tensor,
    grads: Tensor,
    *,
    rtol: float | None = None,
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
        rtol: estimated relative distance of sigma to its limit at which to stop; None: see `KFOC`.
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
    if plan is not None and PLANS[plan].single and samples.num_positions != 1:
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
    samples = Samples(Rows(wide(inputs)), wide(grads))
    for name, largest in zip(("inputs", "grads"), samples.magnitudes, strict=True):
        if not math.isfinite(largest):
            raise ValueError(f"{name} has values that are not finite ({largest})")
    return samples
