"""`online` over ranks: stochastic power iteration whose steps are those of all ranks together.

A rank keeps its samples pending until some rank's buffer is full. Then all take in theirs as if
they were one batch: the half steps of all ranks are summed, and every rank holds the same sums. To
let each rank go its own way, and add up or merge the results, costs far more than the ranks' own
errors where they see different classes: each half step is then taken at directions that the other
ranks' data did not form.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kfoc.kronecker import Contraction, KroneckerFit, Side, norm_of, opposite
from kfoc.plans import Dense
from kfoc.pooling import Pooling, Sum, optimum, summed
from kfoc.pooling import largest as largest_of
from kfoc.products import mirrored
from kfoc.samples import Samples

if TYPE_CHECKING:
    from kfoc.estimators.online import Online

# Of sigma, where the power iteration on the first of all ranks' batches stops.
FIRST_RTOL = 1e-3

# Contractions of what a rank has pending, and the scale that each one's result lacks.
Pending = list[tuple[Contraction, float]]


def synchronised(state: Online) -> Pooling[None]:
    """Take in what all ranks have pending, where a buffer is full on one of them."""
    due, factored = yield from largest_of(state.due, _factored(state))
    if due:
        yield from _advanced(state, *_taken(state, bool(factored)))


def pooled(state: Online) -> Pooling[None]:
    """Take in what all ranks have pending at the end of a pass."""
    dense, factored = yield from largest_of(state.fisher is not None, _factored(state))
    if dense and not factored:
        yield from _summed(state)
        return
    pending, count = _taken(state, bool(factored))
    if state.weight:  # the same on all ranks
        yield from _advanced(state, pending, count)
    else:
        yield from _solved(state, pending, count)


def _factored(state: Online) -> bool:
    """Whether this rank has samples, and does not sum F itself."""
    seen = state.weight > 0 or any(samples.numel for samples in state.pending)
    return state.fisher is None and seen


def _summed(state: Online) -> Pooling[None]:
    """F itself, where every rank with data sums it: each decides by the size of its first batch."""
    count = state.weight + sum(samples.num_samples for samples in state.pending)
    (unit,) = yield from largest_of(state.unit)
    if state.fisher is None:
        o, i = state.shape
        state.fisher, state.pending = state.like.new_zeros(o * i, o * i), []
    state.rescale(unit, 1.0)
    yield [Sum([state.fisher])]
    (state.weight,) = yield from summed(count)


def _taken(state: Online, factored: bool) -> tuple[Pending, float]:
    """What is pending, taken from the state, and its number of samples.

    An F, where others have factors, is a batch like any other.
    """
    pending: Pending = []
    count = 0.0
    if state.fisher is not None and factored:
        pending = [(Dense.of(state.fisher, state.shape), state.unit)]
        count, state.fisher, state.unit, state.weight = state.weight, None, 0.0, 0.0
    samples, state.pending = state.pending, []
    for batch in _joined(samples):
        if batch.num_samples:
            pending.append(state.config.contraction(batch))
            count += batch.num_samples
    return pending, count


def _joined(samples: list[Samples]) -> list[Samples]:
    """As few batches as there are kinds: those of other lengths of sequences do not join."""
    kinds: list[list[Samples]] = []
    for batch in samples:
        for kind in kinds:
            if kind[0].joins(batch):
                kind.append(batch)
                break
        else:
            kinds.append([batch])
    return [kind[0].merged(kind) for kind in kinds]


def _step(state: Online, pending: Pending, unit: float) -> Callable[[Tensor, Side], Tensor]:
    """This rank's part of the half step, times `1 / unit`."""

    def step(factor: Tensor, side: Side) -> Tensor:
        shape = state.right_shape if side == "left" else state.shape[:1] * 2
        image = state.like.new_zeros(shape)
        for contraction, scale in pending:
            steps = contraction.apply(factor, side)
            contraction.accumulate(image, steps, opposite(side), scale / unit)
        return mirrored(image)

    return step


def _advanced(state: Online, pending: Pending, count: float) -> Pooling[None]:
    """One step of `Online` for the batch that all ranks' pending samples are together."""
    scale = max((scale for _, scale in pending), default=0.0)
    (unit,) = yield from largest_of(scale)
    (count,) = yield from summed(count)
    state.weight += count
    if not unit:
        return
    state.rescale(unit, 1.0)
    step = _step(state, pending, state.unit)
    left, right = state.left, state.right
    if any(state.norms):
        w, v = step(_unit(right), "right"), step(_unit(left), "left")
        yield [Sum([w, v])]
        predicted = _unit(left + w), _unit(right + v)
    else:
        # All later batches depend on where this one points, and ranks have few steps in common.
        found = yield from optimum(step, state.start(), FIRST_RTOL, state.config.max_steps)
        predicted = _unit(found.left), _unit(found.right)
    w, v = step(predicted[1], "right"), step(predicted[0], "left")
    yield [Sum([w, v])]
    state.core += (w * predicted[0]).sum().item()
    left += w
    right += v
    state.norms = norm_of(left), norm_of(right)
    state.report = replace(state.report, plan="ranks")


def _solved(state: Online, pending: Pending, count: float) -> Pooling[None]:
    """The optimum of what the ranks have pending, which is all there is."""
    (unit,) = yield from largest_of(max((scale for _, scale in pending), default=0.0))
    (state.weight,) = yield from summed(count)
    if not unit:
        return
    found = yield from state.optimum(_step(state, pending, unit), "ranks")
    scale = unit / state.weight
    left, right = found.balanced(scale)
    state.single = KroneckerFit(
        left, right, found.sigma * scale, None, found.steps, found.converged, "ranks"
    )


def _unit(factor: Tensor) -> Tensor:
    return factor / (torch.linalg.vector_norm(factor) or 1.0)
