"""What the loop over data asks of an estimator."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from kfoc.blocks import Block, GroupedBlock, Report
from kfoc.samples import Grouped, LayerSamples, Samples


class Estimator(ABC):
    """One way to estimate a layer's block from a stream of batches.

    An estimator is configuration: it holds no data and can serve any number of layers and fits.
    A state is whatever `init` returns; the loop keeps one per layer and never looks inside.
    """

    def check(self) -> None:  # noqa: B027  (most have no options)
        """Raise ValueError for options that make no sense; called before any data is read."""

    @abstractmethod
    def init(self, layer: str, samples: LayerSamples) -> Any:
        """The state before any batch; `samples` is the first, for its shape, dtype and device."""

    @abstractmethod
    def update(self, state: Any, samples: LayerSamples, *, alone: bool) -> Any:
        """The state after one more batch; `alone` where it is known to be the only one."""

    def next_pass(self, state: Any) -> tuple[Any, bool]:
        """The state for another pass over the data, and whether none is needed any more."""
        return state, True

    @abstractmethod
    def finish(self, state: Any, num_samples: int) -> Block:
        """The block, from the state after `num_samples` samples in each pass."""

    @property
    def pass_limit(self) -> int:
        """At most so many passes over the data."""
        return 1


class FactoredEstimator(Estimator):
    """Estimators of Kronecker blocks, which give a grouped layer one block per group.

    A single Kronecker product cannot say that the groups have nothing in common; the product of
    each group, with zeros between them, is the closest of its structure.
    """

    @abstractmethod
    def init_one(self, layer: str, samples: Samples) -> Any:
        """As `init`, for one group or a layer without groups; and so the three below."""

    @abstractmethod
    def update_one(self, state: Any, samples: Samples, *, alone: bool) -> Any: ...

    def next_pass_one(self, state: Any) -> tuple[Any, bool]:
        return state, True

    @abstractmethod
    def finish_one(self, state: Any, num_samples: int) -> Block: ...

    def init(self, layer: str, samples: LayerSamples) -> Any:
        if isinstance(samples, Grouped):
            return [self.init_one(layer, group) for group in samples.groups]
        return self.init_one(layer, samples)

    def update(self, state: Any, samples: LayerSamples, *, alone: bool) -> Any:
        if isinstance(samples, Grouped):
            pairs = zip(state, samples.groups, strict=True)
            return [self.update_one(one, group, alone=alone) for one, group in pairs]
        return self.update_one(state, samples, alone=alone)

    def next_pass(self, state: Any) -> tuple[Any, bool]:
        if not isinstance(state, list):
            return self.next_pass_one(state)
        each = [self.next_pass_one(one) for one in state]
        return [one for one, _ in each], all(done for _, done in each)

    def finish(self, state: Any, num_samples: int) -> Block:
        if not isinstance(state, list):
            return self.finish_one(state, num_samples)
        blocks = tuple(self.finish_one(one, num_samples) for one in state)
        reports = [block.report for block in blocks]
        # The groups' own errors say nothing of what lies between the groups: no error of the whole.
        report = Report(
            steps=max(report.steps for report in reports),
            converged=all(report.converged for report in reports),
            plan=reports[0].plan,
        )
        return GroupedBlock(blocks, report=report)
