"""What the Kronecker-factored estimators do with layers that are not one linear map."""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import Any, NamedTuple, cast

from torch import Tensor

from kfoc.blocks import Block, GroupedBlock, KroneckerBlock, Report
from kfoc.errors import Footprint
from kfoc.estimators.base import Estimator
from kfoc.estimators.block_diagonal import BlockDiagonal
from kfoc.estimators.diagonal import Diagonal
from kfoc.estimators.pooling import Pooling, Sum, largest, together, unpooled
from kfoc.linalg.scaling import balanced
from kfoc.plans.base import CHUNK
from kfoc.samples.base import LayerSamples, gradient_chunks
from kfoc.samples.direct import Direct
from kfoc.samples.grouped import Depthwise, Grouped
from kfoc.samples.linear import Samples
from kfoc.samples.tied import Tied

# A factor of this many rows takes 1 GiB in float32; layers with larger ones are left out unless
# they are named.
LARGEST_FACTOR = 2**14

# Layers without a Kronecker structure get their exact block up to this many parameters.
DENSE_LIMIT = 1024


class _Other(NamedTuple):
    """The state of a layer that another estimator takes care of."""

    estimator: Estimator
    state: Any


class _Groups(NamedTuple):
    """The states of a grouped layer's groups, and which of them need no further pass."""

    states: list[Any]
    settled: list[bool]


class _Rows(NamedTuple):
    """The state of a layer whose rows have nothing in common: each row's F, times `1 / unit`."""

    total: Tensor  # (o, i, i)
    unit: float


class FactoredEstimator(Estimator):
    """Estimators of Kronecker blocks, which give a grouped layer one block per group.

    A single Kronecker product cannot say that the groups have nothing in common; the product of
    each group, with zeros between them, is the closest of its structure. Layers that are no linear
    maps (normalisation) get their exact block up to `DENSE_LIMIT` parameters, and their exact
    diagonal beyond.
    """

    @property
    def largest_factor(self) -> int:
        return LARGEST_FACTOR

    @property
    def sums_rows(self) -> bool:
        """Whether a group with a single output gets its F: the optimum, its `left` being 1 x 1."""
        return False

    @abstractmethod
    def init_one(self, layer: str, samples: Samples) -> Any:
        """As `init`, for one group or a layer without groups; and so the three below."""

    @abstractmethod
    def update_one(self, state: Any, samples: Samples, *, alone: bool) -> Any: ...

    def next_pass_one(self, state: Any) -> tuple[Any, bool]:
        return state, True

    @abstractmethod
    def pooled_one(self, state: Any) -> Pooling[Any]: ...

    def decayed_one(self, state: Any, factor: float) -> Any:
        return super().decayed(state, factor)

    def change_one(self, state: Any) -> float | None:
        return None

    @abstractmethod
    def finish_one(self, state: Any, num_samples: float) -> Block: ...

    def init_tied(self, layer: str, samples: Tied) -> Any:
        """As `init`, for an embedding and a head that share their weight."""
        return self.init_one(layer, _as_samples(samples))

    def update_tied(self, state: Any, samples: Tied, *, alone: bool) -> Any:
        return self.update_one(state, _as_samples(samples), alone=alone)

    def footprint_one(self, samples: Samples) -> Footprint:
        """As `footprint`, for one group or a layer without groups."""
        return super().footprint(samples)

    def footprint_tied(self, samples: Tied) -> Footprint:
        """As `footprint`, for an embedding and a head that share their weight."""
        return self.footprint_one(_as_samples(samples))

    def footprint(self, samples: LayerSamples) -> Footprint:
        if isinstance(samples, Direct):
            return _other(samples).footprint(samples)
        if isinstance(samples, Depthwise):
            if self.sums_rows:
                o, i = samples.shape
                each = samples.grads.element_size()
                return Footprint(o * i * i * each, o * (i * i + 1) * each)
            samples = samples.silent(0).grouped()
        if isinstance(samples, Grouped):
            return sum(map(self.footprint_one, samples.groups), Footprint(0, 0))
        if isinstance(samples, Tied):
            return self.footprint_tied(samples)
        return self.footprint_one(cast(Samples, samples))

    def init(self, layer: str, samples: LayerSamples) -> Any:
        if isinstance(samples, Direct):
            other = _other(samples)
            return _Other(other, other.init(layer, samples))
        if isinstance(samples, Depthwise):
            if self.sums_rows:
                o, i = samples.shape
                return _Rows(samples.grads.new_zeros(o, i, i), 0.0)
            samples = samples.grouped()
        if isinstance(samples, Grouped):
            states = [self.init_one(layer, group) for group in samples.groups]
            return _Groups(states, [False] * len(states))
        if isinstance(samples, Tied):
            return self.init_tied(layer, samples)
        return self.init_one(layer, cast(Samples, samples))

    def update(self, state: Any, samples: LayerSamples, *, alone: bool) -> Any:
        if isinstance(samples, Direct):
            updated = state.estimator.update(state.state, samples, alone=alone)
            return _Other(state.estimator, updated)
        if isinstance(samples, Depthwise):
            if isinstance(state, _Rows):
                return _with_rows(state, samples)
            samples = samples.grouped()
        if isinstance(samples, Grouped):
            # A settled group must not see the passes that another one still needs.
            states = [
                one if settled else self.update_one(one, group, alone=alone)
                for one, settled, group in zip(*state, samples.groups, strict=True)
            ]
            return _Groups(states, state.settled)
        if isinstance(samples, Tied):
            return self.update_tied(state, samples, alone=alone)
        return self.update_one(state, cast(Samples, samples), alone=alone)

    def next_pass(self, state: Any) -> tuple[Any, bool]:
        if isinstance(state, _Other | _Rows):
            return state, True
        if not isinstance(state, _Groups):
            return self.next_pass_one(state)
        each = [
            (one, True) if settled else self.next_pass_one(one)
            for one, settled in zip(*state, strict=True)
        ]
        groups = _Groups([one for one, _ in each], [done for _, done in each])
        return groups, all(groups.settled)

    def decayed(self, state: Any, factor: float) -> Any:
        if isinstance(state, _Other):
            return _Other(state.estimator, state.estimator.decayed(state.state, factor))
        if isinstance(state, _Rows):
            return state._replace(total=state.total.mul_(factor))
        if isinstance(state, _Groups):
            return _Groups([self.decayed_one(s, factor) for s in state.states], state.settled)
        return self.decayed_one(state, factor)

    def pooled(self, state: Any) -> Pooling[Any]:
        if isinstance(state, _Other):
            pooled = yield from state.estimator.pooled(state.state)
            return _Other(state.estimator, pooled)
        if isinstance(state, _Rows):
            return (yield from _pooled_rows(state))
        if not isinstance(state, _Groups):
            return (yield from self.pooled_one(state))
        poolings = [
            unpooled(one) if settled else self.pooled_one(one)
            for one, settled in zip(*state, strict=True)
        ]
        return _Groups((yield from together(poolings)), state.settled)

    def change(self, state: Any) -> float | None:
        changes = [self.change_one(one) for one in _single(state)]
        return max((change for change in changes if change is not None), default=None)

    def finish(self, state: Any, num_samples: float) -> Block:
        if isinstance(state, _Other):
            return state.estimator.finish(state.state, num_samples)
        if isinstance(state, _Rows):
            return _rows_block(state, num_samples)
        if not isinstance(state, _Groups):
            return self.finish_one(state, num_samples)
        blocks = tuple(self.finish_one(one, num_samples) for one in state.states)
        reports = [block.report for block in blocks]
        # The groups' own errors say nothing of what lies between the groups: no error of the whole.
        report = Report(
            steps=max(report.steps for report in reports),
            converged=all(report.converged for report in reports),
            plan=reports[0].plan,
            head=reports[0].head,
        )
        return GroupedBlock(blocks, report=report)


def _single(state: Any) -> list[Any]:
    """The states of this estimator's own that a layer has: none, one, or one per group."""
    if isinstance(state, _Other | _Rows):
        return []
    return state.states if isinstance(state, _Groups) else [state]


def _other(samples: Direct) -> Estimator:
    o, i = samples.shape
    return BlockDiagonal() if o * i <= DENSE_LIMIT else Diagonal()


def factors_bytes(samples: Samples) -> int:
    """Of one Kronecker product's two factors."""
    numbers = samples.shape[0] ** 2 + math.prod(samples.right_shape)
    return numbers * samples.grads.element_size()


def _as_samples(samples: Tied) -> Samples:
    # With a diagonal factor, contracted as they are: they have all that aggregations ask for.
    return cast(Samples, samples) if samples.diagonal else samples.as_positions()


def _with_rows(state: _Rows, samples: Depthwise) -> _Rows:
    """Add a batch's `sum X_g^T X_g` for every row g, in the larger of the scales."""
    rescaled, scale = samples.rescaled()
    if not scale:
        return state
    unit = max(state.unit, scale)
    total = state.total.mul_(state.unit / unit)
    o, i = samples.shape
    for gradients in gradient_chunks(rescaled, CHUNK):
        rows = gradients.permute(2, 0, 1, 3).reshape(o, -1, i)
        total.baddbmm_(rows.mT, rows, alpha=scale / unit)
    return _Rows(total, unit)


def _pooled_rows(state: _Rows) -> Pooling[_Rows]:
    (unit,) = yield from largest(state.unit)
    state.total.mul_(state.unit / (unit or 1.0))
    yield [Sum([state.total])]
    return _Rows(state.total, unit)


def _rows_block(state: _Rows, num_samples: float) -> GroupedBlock:
    total, scale = (state.total + state.total.mT) / 2, state.unit / num_samples
    one = total.new_ones(1, 1)
    # Norms are those of the total, near one: squares of F's own numbers may leave their range.
    blocks = tuple(
        KroneckerBlock(*balanced(one, each, each.norm().item() * scale), report=Report(plan="rows"))
        for each in total
    )
    return GroupedBlock(blocks, report=Report(plan="rows"))
