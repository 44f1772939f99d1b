"""`online` over ranks: one stochastic power iteration, whose sums lie with the ranks in shares.

The ranks begin together: when the first buffer is full, the power iteration on all that they have
pending gives the directions that all later batches depend on. (Ranks that see different classes
would find different ones by themselves, and neither to add up nor to merge what comes of that mends
it.) From then on each holds a share of the sums, takes in its own batches as one process does, and
now and then all shares are summed and shared out anew: after so many buffers as there were before.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kfoc.estimators.pooling import Pooling, Sum, optimum, summed
from kfoc.estimators.pooling import largest as largest_of
from kfoc.linalg.products import mirrored
from kfoc.linalg.scaling import norm_of
from kfoc.nearest.contraction import Contraction, Side, opposite
from kfoc.nearest.power import KroneckerFit
from kfoc.plans.explicit import Dense

if TYPE_CHECKING:
    from kfoc.estimators.online import Online

# Of sigma, where the power iteration on the first of all ranks' batches stops.
FIRST_RTOL = 1e-3

# Contractions of what a rank has pending, and the scale that each one's result lacks.
Pending = list[tuple[Contraction, float]]


def synchronised(state: Online) -> Pooling[None]:
    """Begin together, or exchange the sums, where a rank is due."""
    due, factored = yield from largest_of(state.due, _factored(state))
    if not due:
        return
    if state.waits:
        yield from _begun(state, *_taken(state, bool(factored)))
    else:
        yield from _exchanged(state, share=True)


def pooled(state: Online) -> Pooling[None]:
    """What all ranks have seen, at the end of a pass."""
    dense, factored = yield from largest_of(state.fisher is not None, _factored(state))
    if dense and not factored:
        yield from _summed(state)
    elif state.waits:  # on all ranks, which come to the first step together
        yield from _solved(state, *_taken(state, bool(factored)))
    else:
        state.flush()
        yield from _exchanged(state, share=False)


def _factored(state: Online) -> bool:
    """Whether this rank has samples, and does not sum F itself."""
    seen = state.weight > 0 or state.pending.numel > 0
    return state.fisher is None and seen


def _summed(state: Online) -> Pooling[None]:
    """F itself, where every rank with data sums it: each decides by the size of its first batch."""
    count = state.weight + state.pending.num_samples
    (unit,) = yield from largest_of(state.unit)
    if state.fisher is None:
        o, i = state.shape
        state.fisher = state.like.new_zeros(o * i, o * i)
        state.pending.taken()
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
    for batch in state.pending.taken():
        if batch.num_samples:
            pending.append(state.config.contraction(batch))
            count += batch.num_samples
    return pending, count


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


def _begun(state: Online, pending: Pending, count: float) -> Pooling[None]:
    """The first step, at the optimum of all ranks' pending samples; each rank gets its share."""
    state.weight += count
    (unit,) = yield from largest_of(max((scale for _, scale in pending), default=0.0))
    if not unit:
        return
    state.rescale(unit, 1.0)
    step = _step(state, pending, unit)
    found = yield from optimum(step, state.start(), FIRST_RTOL, state.config.max_steps)
    left, right = _unit(found.left), _unit(found.right)
    state.left, state.right = step(right, "right"), step(left, "left")
    state.core = (state.left * left).sum().item()
    state.waits = False
    state.report = replace(state.report, plan="ranks")
    yield from _exchanged(state, share=True)


def _exchanged(state: Online, share: bool) -> Pooling[None]:
    """All ranks' sums; with `share`, each rank keeps so large a part of them."""
    (unit,) = yield from largest_of(state.unit)
    state.rescale(unit, 1.0)
    state.left, state.right = mirrored(state.left), mirrored(state.right)
    yield [Sum([state.left, state.right])]
    core, weight, world = yield from summed(state.core, state.weight, 1)
    if share:
        state.left /= world
        state.right /= world
        core, weight = core / world, weight / world
    state.core, state.weight = core, weight
    state.norms = norm_of(state.left), norm_of(state.right)
    state.taken, state.until = 0, max(1, 2 * state.until)


def _solved(state: Online, pending: Pending, count: float) -> Pooling[None]:
    """The optimum of what the ranks have pending, which is all there is."""
    (unit,) = yield from largest_of(max((scale for _, scale in pending), default=0.0))
    (state.weight,) = yield from summed(state.weight + count)
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
