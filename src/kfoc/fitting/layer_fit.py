"""One layer in a fit: what has been collected of it, and its block in the end."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace

from kfoc.blocks import Block
from kfoc.errors import Footprint, advised, naming
from kfoc.estimators import Estimator
from kfoc.estimators.base import State
from kfoc.estimators.certificate import Probes
from kfoc.fitting.ranges import check_range
from kfoc.fitting.task import Task
from kfoc.linalg.scaling import squared
from kfoc.samples.base import LayerSamples

LESS_MEMORY = (
    "use smaller batches, a smaller memory_limit or buffer of kfoc.KFOC, or leave the layer out by "
    "layers=..."
)


@dataclass
class LayerFit:
    """One layer between batches.

    Attributes:
        name: of the layer.
        silent: its samples in a batch of none: of which kind, shape and dtype they are.
        state: None where another fit of the same task has it, and once the block is made.
        probes: None where there are none.
        largest: of all inputs, and of all gradients: what tells numbers that vanished from zeros.
        settled: no further batch is needed.
        footprint: what state, block and probes take at most; None where nobody asks.
    """

    name: str
    silent: LayerSamples
    state: State | None = None
    probes: Probes | None = None
    largest: tuple[float, float] = (0.0, 0.0)
    settled: bool = False
    footprint: Footprint | None = None

    def begin(self, task: Task, estimator: Estimator, samples: LayerSamples) -> None:
        """Make the state, before any batch; `samples` are of the first."""
        self.state = estimator.begin(self.name, samples)
        if task.probes:
            self.probes = Probes(task.probes, task.seed, self.name, samples, task.drawn)

    def measure(self, task: Task, estimator: Estimator, samples: LayerSamples) -> None:
        """Find the footprint, from the samples of the first batch."""
        o, i = samples.shape
        each = 4 if task.drawn else 2  # of `Probes`: v, F v, and two products with draws unseen
        probes = each * task.probes * o * i * samples.grads.element_size()
        self.footprint = estimator.footprint(samples) + Footprint(probes, 0)

    def add(self, samples: LayerSamples, alone: bool, *, probed: bool) -> None:
        """Take in the samples of a batch.

        Args:
            alone: the batch is known to be the only one.
            probed: the probes are to see them too.

        Raises:
            ValueError: samples of another kind, or beyond the range of their dtype.
        """
        if type(samples) is not type(self.silent):
            raise ValueError(
                f"layer {self.name!r}: it is called in another way than in the batches before (as "
                "self-attention and as cross-attention?)"
            )
        assert self.state is not None
        if self.probes is not None and probed:
            self.probes.add(samples)
        self._note_scale(samples)
        self.state.add(samples, alone)

    def add_silent(self, count: int, *, probed: bool) -> None:
        """Take in so many samples that did not reach the layer: their gradients are zero."""
        self.add(self.silent.silent(count), False, probed=probed)

    def _note_scale(self, samples: LayerSamples) -> None:
        inputs, grads = samples.magnitudes
        self.largest = max(self.largest[0], inputs), max(self.largest[1], grads)
        if inputs and grads:
            with naming(self.name):
                squared(inputs * grads)

    def end_pass(self) -> None:
        """Prepare the state for another pass, or know that it needs none."""
        assert self.state is not None
        with advised(f"layer {self.name!r}", LESS_MEMORY), naming(self.name):
            self.settled = self.state.next_pass()

    def block(self, task: Task, count: float, unchecked: str, *, keep: bool) -> Block:
        """The block, of `count` samples.

        Args:
            unchecked: what of the samples was taken on trust, see `Report`.
            keep: leave the state as it is; otherwise it is used up.
        """
        assert self.state is not None
        with advised(f"layer {self.name!r}", LESS_MEMORY), naming(self.name):
            state = copy.deepcopy(self.state) if keep else self.state
            if not keep:
                self.state = None
            change = state.change()
            block = state.block(count)
            del state
        check_range(self.name, block, self.largest)
        if self.probes is not None:
            block = self.probes.certified(block, round(count))
            self.probes = None
        known = replace(block.report, change=change, unchecked=unchecked)
        if not task.drawn:
            known = replace(
                known, fisher_error=known.relative_error, fisher_error_std=known.standard_error
            )
        return block if known == block.report else replace(block, report=known)
