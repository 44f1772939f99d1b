"""What the Kronecker-factored estimators do with layers that are not one linear map."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from typing import cast

from kfoc.blocks import Block, GroupedBlock, Report
from kfoc.errors import Footprint
from kfoc.estimators.base import Estimator, State
from kfoc.estimators.block_diagonal import BlockDiagonal
from kfoc.estimators.diagonal import Diagonal
from kfoc.estimators.pooling import Pooling, together
from kfoc.estimators.rows import Rows
from kfoc.samples.base import LayerSamples
from kfoc.samples.direct import Direct
from kfoc.samples.grouped import Depthwise, Grouped
from kfoc.samples.linear import Samples
from kfoc.samples.tied import Tied

# A factor of this many rows takes 1 GiB in float32; layers with larger ones are left out unless
# they are named.
LARGEST_FACTOR = 2**14

# Layers without a Kronecker structure get their exact block up to this many parameters.
DENSE_LIMIT = 1024


@dataclass
class _Groups(State):
    """A grouped layer: its groups' states, and which of them need no further pass."""

    states: list[State]
    settled: list[bool]

    def add(self, samples: Grouped | Depthwise, alone: bool) -> None:
        groups = samples.grouped().groups if isinstance(samples, Depthwise) else samples.groups
        # A settled group must not see the passes that another one still needs.
        for state, settled, group in zip(self.states, self.settled, groups, strict=True):
            if not settled:
                state.add(group, alone)

    def next_pass(self) -> bool:
        each = zip(self.states, self.settled, strict=True)
        self.settled = [settled or state.next_pass() for state, settled in each]
        return all(self.settled)

    def change(self) -> float | None:
        return _largest(state.change() for state in self.states)

    def decay(self, factor: float) -> None:
        for state in self.states:
            state.decay(factor)

    def pooled(self) -> Pooling[None]:
        each = zip(self.states, self.settled, strict=True)
        yield from together([state.pooled() for state, settled in each if not settled])

    def block(self, num_samples: float) -> Block:
        blocks = tuple(state.block(num_samples) for state in self.states)
        reports = [block.report for block in blocks]
        # The groups' own errors say nothing of what lies between the groups: no error of the whole.
        report = Report(
            steps=max(report.steps for report in reports),
            converged=all(report.converged for report in reports),
            plan=reports[0].plan,
            head=reports[0].head,
            gap=_largest(report.gap for report in reports),
        )
        return GroupedBlock(blocks, report=report)


def _largest(values: Iterable[float | None]) -> float | None:
    """Of those that are known."""
    return max((value for value in values if value is not None), default=None)


@dataclass
class _AsPositions(State):
    """An embedding and a head that share their weight, as positions of one linear map."""

    state: State

    def add(self, samples: Tied, alone: bool) -> None:
        self.state.add(samples.as_positions(), alone)

    def next_pass(self) -> bool:
        return self.state.next_pass()

    def change(self) -> float | None:
        return self.state.change()

    def decay(self, factor: float) -> None:
        self.state.decay(factor)

    def pooled(self) -> Pooling[None]:
        yield from self.state.pooled()

    def block(self, num_samples: float) -> Block:
        return self.state.block(num_samples)


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
    def begin_one(self, layer: str, samples: Samples) -> State:
        """As `begin`, for one group or a layer without groups."""

    def begin_tied(self, layer: str, samples: Tied) -> State:
        """As `begin`, for an embedding and a head that share their weight."""
        state = self.begin_one(layer, _as_samples(samples))
        return state if samples.diagonal else _AsPositions(state)

    def begin(self, layer: str, samples: LayerSamples) -> State:
        if isinstance(samples, Direct):
            return _other(samples).begin(layer, samples)
        if isinstance(samples, Depthwise):
            if self.sums_rows:
                o, i = samples.shape
                return Rows(samples.grads.new_zeros(o, i, i))
            samples = samples.grouped()
        if isinstance(samples, Grouped):
            states = [self.begin_one(layer, group) for group in samples.groups]
            return _Groups(states, [False] * len(states))
        if isinstance(samples, Tied):
            return self.begin_tied(layer, samples)
        return self.begin_one(layer, cast(Samples, samples))

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
