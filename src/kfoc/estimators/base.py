"""What the loop over data asks of an estimator."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

from kfoc.blocks import Block
from kfoc.errors import Footprint
from kfoc.estimators.pooling import Pooling
from kfoc.parameters.layout import Layout
from kfoc.samples.base import LayerSamples


class Estimator(ABC):
    """One way to estimate a layer's block from a stream of batches.

    An estimator is configuration: it holds no data and can serve any number of layers and fits.
    A state is whatever `init` returns; the loop keeps one per layer and never looks inside.
    """

    def check(self) -> None:  # noqa: B027  (most have no options)
        """Raise ValueError for options that make no sense; called before any data is read."""

    def sized(self, layouts: Mapping[str, Layout]) -> Estimator:
        """The estimator for layers of these sizes, by name: how much it keeps may depend on all."""
        return self

    @abstractmethod
    def init(self, layer: str, samples: LayerSamples) -> Any:
        """The state before any batch; `samples` is the first, for its shape, dtype and device."""

    @abstractmethod
    def update(self, state: Any, samples: LayerSamples, *, alone: bool) -> Any:
        """The state after one more batch; `alone` where it is known to be the only one."""

    def next_pass(self, state: Any) -> tuple[Any, bool]:
        """The state for another pass over the data, and whether none is needed any more."""
        return state, True

    def change(self, state: Any) -> float | None:
        """How much the last pass changed sigma, relatively; None where that is not known."""
        return None

    @abstractmethod
    def finish(self, state: Any, num_samples: float) -> Block:
        """The block, from the state after `num_samples` samples in each pass."""

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
        """The estimator to use where `decayed` is called before every batch."""
        return self

    def decayed(self, state: Any, factor: float) -> Any:
        """The state, with all that it has seen counting `factor` times as much as what follows.

        `finish` is then given the sum of the samples' weights for `num_samples`.

        Raises:
            ValueError: an estimator whose state does not allow that.
        """
        raise ValueError(
            f"{self} cannot let old batches count less than new ones: use kfoc.KFOC(), kfoc.KFAC() "
            "or kfoc.Diagonal(), or no decay"
        )

    def pooled(self, state: Any) -> Pooling[Any]:
        """The state of what all ranks have seen, from the state of this one's share.

        Called on all ranks at once at the end of every pass, before `next_pass`.

        Raises:
            ValueError: an estimator whose states cannot be pooled.
        """
        raise ValueError(f"{self} cannot be fitted over several ranks: leave out group=...")

    @property
    def pass_limit(self) -> int:
        """At most so many passes over the data."""
        return 1

    @property
    def largest_factor(self) -> int | None:
        """Layers that would need a larger factor are treated by name alone; None: no limit."""
        return None
