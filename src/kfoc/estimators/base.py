"""What the loop over data asks of an estimator, and of a layer's state."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from kfoc.blocks import Block
from kfoc.errors import Footprint
from kfoc.estimators.pooling import Pooling, Sum
from kfoc.parameters.layout import Layout
from kfoc.samples.base import LayerSamples


class State(ABC):
    """One layer between batches.

    What is nothing but sums over samples names them in `totals`, and can then be decayed and
    pooled. Other states say how, or do without.
    """

    @abstractmethod
    def add(self, samples: Any, alone: bool) -> None:
        """Take in one more batch, of the kind of samples that the state was begun with.

        Args:
            alone: it is known to be the only one.
        """

    @abstractmethod
    def block(self, num_samples: float) -> Block:
        """The block, after `num_samples` samples in each pass; the state may be used up by it."""

    def next_pass(self) -> bool:
        """Prepare for another pass over the data; True where none is needed any more."""
        return True

    def change(self) -> float | None:
        """How much the last pass changed sigma, relatively; None where that is not known."""
        return None

    def totals(self) -> list[Tensor]:
        """The sums over samples that the state consists of, contiguous."""
        raise ValueError(
            f"{type(self).__qualname__} does not say how it is decayed, or put together with those "
            "of other ranks: leave out decay and group=..., or give it a method `totals`"
        )

    def decay(self, factor: float) -> None:
        """Let all that was added so far count `factor` times.

        `block` is then given the sum of the samples' weights for `num_samples`.

        Raises:
            ValueError: a state that does not allow that.
        """
        for total in self.totals():
            total.mul_(factor)

    def pooled(self) -> Pooling[None]:
        """Take in what the other ranks have seen.

        Called on all ranks at once at the end of every pass, before `next_pass`.

        Raises:
            ValueError: a state that does not allow that.
        """
        yield [Sum(self.totals())]


class Estimator(ABC):
    """One way to estimate a layer's block from a stream of batches.

    An estimator is configuration: it holds no data and can serve any number of layers and fits.
    """

    def check(self) -> None:  # noqa: B027  (most have no options)
        """Raise ValueError for options that make no sense; called before any data is read."""

    def sized(self, layouts: Mapping[str, Layout]) -> Estimator:
        """The estimator for layers of these sizes, by name: how much it keeps may depend on all."""
        return self

    @abstractmethod
    def begin(self, layer: str, samples: LayerSamples) -> State:
        """The state before any batch; `samples` is the first, for its shape, dtype and device."""

    def footprint(self, samples: LayerSamples) -> Footprint:
        """Upper bounds of what a layer's state and block take; `samples` are its first.

        Raises:
            ValueError: an estimator that does not say.
        """
        raise ValueError(
            f"{self} does not say how much memory its states take: fit it without memory_budget, "
            "or give its class a method `footprint`"
        )

    def streaming(self) -> Estimator:
        """The estimator to use where states are decayed before every batch."""
        return self

    @property
    def pass_limit(self) -> int:
        """At most so many passes over the data."""
        return 1

    @property
    def largest_factor(self) -> int | None:
        """Layers that would need a larger factor are treated by name alone; None: no limit."""
        return None
