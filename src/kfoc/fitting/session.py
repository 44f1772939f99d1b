"""A fit between its first batch and its curvature: every layer's state, batch by batch."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from functools import cached_property, partial
from typing import Any

from torch import Tensor

from kfoc.blocks import Block
from kfoc.common.threads import seed_of
from kfoc.curvature.curvature import Curvature
from kfoc.errors import within
from kfoc.estimators import Estimator
from kfoc.fitting.layer_fit import LayerFit
from kfoc.fitting.marks import Mark
from kfoc.fitting.reader import Cotangents, Reader, Reading
from kfoc.fitting.task import Task
from kfoc.layers.select import select
from kfoc.linalg.scaling import wide
from kfoc.model.batches import check_next_token, moved, unpacked
from kfoc.model.hooks import captured
from kfoc.model.undisturbed import undisturbed
from kfoc.parameters.coverage import NOT_CALLED, parameter_counts
from kfoc.samples.base import LayerSamples

# What makes seeds of their own, far from the user's, for the two draws that no block sees.
UNSEEN = 0x2545F4914F6CDD1D, 0x369DEA0F31A53F85

# Outputs of a sample beyond which `fisher="exact"` is warned of: more than most sets of classes.
MANY = 2048

# Whether a session is to fit a layer that it meets, in these samples, and has no state of yet.
Takes = Callable[["Session", LayerFit, LayerSamples], bool]


class Session:
    """One fit, fed by whoever runs it: `take` every batch, `end_pass`, and so on until that says
    that no layer needs another pass; then `curvature`.

    Batches are taken in while `watching`.

    Attributes:
        layers: what there is of each layer that a batch has reached, in the order of meeting them.
        batches: taken in, in this pass.
        samples: the same of samples.
        weight: that of those samples, when the next ones count 1 each.
        passes: over the data that have ended.
        num_samples: in a pass.
        updates: of any layer's state: whether a failed batch has left traces.
        marks: of every batch in the first pass, where there are more passes.
    """

    def __init__(
        self,
        task: Task,
        *,
        takes: Takes | None = None,
        marks: list[Mark] | None = None,
        passes_before: int = 0,
    ) -> None:
        """
        Args:
            takes: None: all layers are fitted.
            marks: where other sessions read the same data: those of the one before, or the list
                that is to hold them; None: no other does.
            passes_before: how many passes other sessions have made.
        """
        self.task = task
        self.selection = select(task.model, task.layers, task.estimator.largest_factor)
        self.layers: dict[str, LayerFit] = {}
        self.reader = Reader(task, self.selection, self.layers)
        self.likelihood = task.likelihood
        self.batches = self.samples = self.passes = self.num_samples = self.updates = 0
        self.weight = 0.0
        self.marks: list[Mark] = [] if marks is None else marks
        self._marking = marks is not None or task.estimator.pass_limit > 1
        self._takes, self._passes_before = takes, passes_before

    @contextmanager
    def watching(self) -> Iterator[None]:
        """The model's layers are watched; afterwards model and process are as they were."""
        modules = list(self.task.model.modules())
        with undisturbed(modules), captured(self.selection) as self.reader.record:
            yield

    @property
    def earlier(self) -> int:
        """How many passes over the data there were before this one, those of others included."""
        return self.passes + self._passes_before

    @cached_property
    def estimator(self) -> Estimator:
        """The task's, for the layers that there are."""
        layouts = {name: self.selection.layout(name) for name in self.selection.layers}
        return self.task.estimator.sized(layouts)

    @property
    def fitted(self) -> dict[str, LayerFit]:
        """The layers that this session has a state of."""
        return {name: layer for name, layer in self.layers.items() if layer.state is not None}

    def take(
        self,
        batch: Any,
        *,
        alone: bool = False,
        place: int | None = None,
        numbered: Callable[[int], int] | None = None,
    ) -> None:
        """Take in one batch.

        Args:
            alone: it is known to be all of the data.
            place: its number among those of all ranks, from 0; None: there are no others.
            numbered: from its number of samples to the first one's number among those of all
                ranks; None: they follow on those before.

        Raises:
            ValueError: data, outputs or values that are no good; the message names batch and layer.
        """
        number = self.batches
        try:
            with within(f"batch {number}"):
                self._take(batch, alone, number if place is None else place, numbered)
        except ValueError as error:
            if type(error) is not ValueError:  # the user's own
                raise
            raise ValueError(f"batch {number}: {error}") from error

    def _take(
        self, batch: Any, alone: bool, place: int, numbered: Callable[[int], int] | None
    ) -> None:
        task = self.task
        check_next_token(task.model, batch, task.predict)
        inputs, targets = unpacked(batch, task.predict)
        inputs, targets = moved(inputs, task.model), moved(targets, task.model)
        count = first = -1

        def directions(outputs: Tensor) -> Cotangents:
            nonlocal count, first
            if count < 0:  # the first of the batch's forward passes
                self._check_same(outputs, targets)
                self._warn_of_price(outputs)
                count = len(outputs)
                first = self.samples if numbered is None else numbered(count)
            return partial(self._cotangents, outputs.detach(), targets, first)

        def take(name: str, samples: LayerSamples) -> None:
            self._take_in(name, samples, alone, first)

        seed = seed_of(task.seed, place)
        # Who chooses among the layers does so in the order of the model.
        at_once = self._takes is None or bool(self.fitted)
        reading = Reading(inputs, seed, directions, take, at_once)
        self.reader.read(reading)
        for name, layer in self.fitted.items():  # those that it did not reach
            if name not in reading.reached and not layer.settled:
                self._add_silent(layer, count)
        self.batches, self.samples, self.weight = (
            self.batches + 1,
            self.samples + count,
            self.weight + count,
        )

    @property
    def _probed(self) -> bool:
        """Whether probes see this pass's samples, and take draws of their own of them."""
        return bool(self.task.probes) and not self.passes

    @property
    def _draws_more(self) -> bool:
        return self._probed and self.task.drawn

    def _cotangents(self, outputs: Tensor, targets: Any, first: int) -> Iterator[Tensor]:
        """Those of the outputs (N, ...) for the block, and then those for its probes alone."""
        task = self.task
        values = wide(outputs)
        self.likelihood = self.likelihood.settled(values, targets)
        draws = [(task.mc_samples, task.seed)]
        if self._draws_more:
            draws += [(1, task.seed ^ key) for key in UNSEEN]
        return (
            cotangent.to(outputs)
            for count, seed in draws
            for cotangent in self.likelihood.cotangents(
                values, targets, task.fisher, count, seed, first
            )
        )

    def _check_same(self, outputs: Tensor, targets: Any) -> None:
        """Several passes must see the same batches; their outputs tell when they do not."""
        if not self._marking:
            return
        values, fisher = outputs.detach(), self.task.fisher
        likelihood = self.likelihood.settled(values, targets)
        likelihood.check(values, targets, fisher)
        mark = Mark.of_batch(values, targets, likelihood, fisher)
        if not self.earlier:
            self.marks.append(mark)
        elif self.batches >= len(self.marks) or not self.marks[self.batches].same(mark):
            raise ValueError(
                f"pass {self.earlier + 1} does not see what the first pass saw: several passes "
                "need the same batches each time (DataLoader: shuffle=False, no random "
                "augmentation)"
            )

    def _warn_of_price(self, outputs: Tensor) -> None:
        """Before the first backward pass, of what is likely to be a mistake."""
        first = not self.batches and not self.earlier
        if first and self.task.fisher == "exact" and outputs[0].numel() > MANY:
            warnings.warn(
                f'fisher="exact" takes a backward pass for each output of a sample, of which there '
                f"are {outputs[0].numel():,} (outputs of shape {tuple(outputs.shape)}), for every "
                'batch: fisher="mc" takes one for each of mc_samples draws',
                RuntimeWarning,
                stacklevel=2,
            )

    def _take_in(self, name: str, samples: LayerSamples, alone: bool, first: int) -> None:
        """Let the block see all directions, but for the draws that are for its probes alone."""
        unseen = None
        if self._draws_more:
            own = samples.num_directions - len(UNSEEN)
            unseen = samples.of_directions(slice(own, None))
            samples = samples.of_directions(slice(own))
        layer = self.layers.get(name) or self.meet(name, samples)
        if layer.state is None:
            return
        self.updates += 1
        layer.add(samples, alone, probed=self._probed)
        if unseen is not None and layer.probes is not None:
            layer.probes.add_unseen(unseen, first)

    def meet(self, name: str, samples: LayerSamples) -> LayerFit:
        """Begin a layer, which none of the samples so far has reached."""
        layer = LayerFit(name, samples.silent(0))
        if self._takes is not None:
            layer.settled = not self._takes(self, layer, samples)
        self.layers[name] = layer
        if layer.settled:
            return layer
        layer.begin(self.task, self.estimator, samples)
        if self.samples:  # their gradients are zero
            self._add_silent(layer, self.samples)
            if self.weight != self.samples and layer.state is not None:
                layer.state.decay(self.weight / self.samples)
        return layer

    def _add_silent(self, layer: LayerFit, count: int) -> None:
        self.updates += 1
        layer.add_silent(count, probed=self._probed)

    def decay(self, factor: float) -> None:
        """Let all that was taken in so far count `factor` times."""
        self.weight *= factor
        for layer in self.fitted.values():
            assert layer.state is not None
            layer.state.decay(factor)

    def check_pass(self) -> None:
        """Raise ValueError for a pass over the data that had not as many batches as the first."""
        if self.earlier and self.batches != len(self.marks):
            raise ValueError(
                f"pass {self.earlier + 1} over the data had {self.batches} batches where the first "
                f"had {len(self.marks)}: several passes need the same batches each time"
            )

    def end_pass(self, samples: int) -> bool:
        """End a pass of so many samples, of all ranks; True where no layer needs another."""
        self.num_samples, self.passes = samples, self.passes + 1
        self.batches, self.samples, self.weight = 0, 0, 0.0
        for layer in self.fitted.values():
            if not layer.settled:
                layer.end_pass()
        settled = all(layer.settled for layer in self.layers.values())
        return settled or self.passes >= self.task.estimator.pass_limit

    def curvature(
        self,
        put: Callable[[str, Block], Block] | None = None,
        elsewhere: Collection[str] = (),
    ) -> Curvature:
        """The curvature of the layers that were fitted; the session ends with it.

        Args:
            put: gets every layer's block, as soon as it is made, and says what is to be kept.
            elsewhere: layers of other sessions, which this one may not have met.

        Raises:
            ValueError: no layer was reached, or one was not that was asked for by name.
        """
        known = {*self.layers, *elsewhere}
        for name in [name for name in self.selection.blocks if name not in known]:
            loose = name in self.selection.loose
            reason = "no output depends on it" if loose else NOT_CALLED
            if loose and self.reader.is_sharded:
                reason = "there are no per-sample gradients of sharded parameters one by one"
            self.selection.skip(name, reason)
        if not known:
            raise ValueError(f"no layer can be treated: {self.selection.skipped}")
        blocks = {}
        for name in self._in_order():
            # A layer at a time: states and blocks together would take the memory twice.
            block = self._block(name, self.num_samples, keep=False)
            blocks[name] = put(name, block) if put else block
            del block
        return self._whole(blocks, self.num_samples, self.selection.skipped)

    def snapshot(self, num_samples: int) -> Curvature:
        """The curvature of what was taken in so far; the states stay as they are.

        Args:
            num_samples: what it is to say that it is the mean over.
        """
        blocks = {name: self._block(name, self.weight, keep=True) for name in self._in_order()}
        unseen = [name for name in self.selection.blocks if name not in blocks]
        skipped = self.selection.skipped | dict.fromkeys(unseen, NOT_CALLED)
        return self._whole(blocks, num_samples, skipped)

    def _in_order(self) -> list[str]:
        fitted = self.fitted
        return [name for name in self.selection.blocks if name in fitted]

    def _block(self, name: str, count: float, *, keep: bool) -> Block:
        unchecked = self.reader.unchecked(name)
        return self.layers[name].block(self.task, count, unchecked, keep=keep)

    def _whole(self, blocks: dict[str, Block], count: int, skipped: dict[str, str]) -> Curvature:
        layouts = {name: self.selection.layout(name) for name in blocks}
        task = self.task
        origin = repr(task.estimator), task.fisher, task.seed, parameter_counts(task.model)
        return Curvature(blocks, count, layouts, dict(skipped), *origin)
