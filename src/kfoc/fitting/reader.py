"""A batch on its way through the model: forward, checked, backward, and every layer's samples."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from kfoc.common.ambient import callers
from kfoc.common.threads import seeded
from kfoc.errors import advised
from kfoc.fitting.layer_fit import LESS_MEMORY, LayerFit
from kfoc.fitting.marks import Mark
from kfoc.fitting.task import Task
from kfoc.layers.rule import Unsupported
from kfoc.layers.selection import LOOSE_LIMIT, Selection
from kfoc.linalg.scaling import finite
from kfoc.model.backward import (
    Tagged,
    checked_finite,
    output_gradients,
    tagged_gradients,
    take_samples,
)
from kfoc.model.batches import called, checked_outputs
from kfoc.model.buffers import buffers_kept
from kfoc.model.functional import count_samples, first_samples
from kfoc.model.graph import Graph
from kfoc.model.ownership import Directions, InOrder, Rule
from kfoc.model.proof import (
    FEW,
    UNSURE,
    Findings,
    Proof,
    check,
    fitting,
    is_scattered,
    seen_anew,
    unfitting,
)
from kfoc.model.review import UNCALLED, untreatable
from kfoc.model.sharding import is_sharded
from kfoc.model.trace import Call, Record
from kfoc.model.uncovered import UNSUMMED, Batch, Uncovered, check_size
from kfoc.samples.base import LayerSamples
from kfoc.samples.direct import Direct

# A layer's calls and derivatives that wait for a check.
Late = tuple[list[Call], Directions]
# Makes the cotangents of a batch's outputs, one for each direction, as often as it is called.
Cotangents = Callable[[], Iterator[Tensor]]


@dataclass
class Reading:
    """What is asked of one batch.

    Attributes:
        inputs: on the model's device.
        seed: of what the forward pass draws.
        directions: from a forward pass's outputs to their cotangents.
        take: gets a layer's name and samples.
        at_once: whether layers may be taken as soon as the backward pass is past them, from the
            last to the first; otherwise in the order of the model.
        reached: names of the layers whose derivatives are taken.
    """

    inputs: Any
    seed: int
    directions: Callable[[Tensor], Cotangents]
    take: Callable[[str, LayerSamples], None]
    at_once: bool
    reached: set[str] = field(default_factory=set)


class Reader:
    """Brings batches through the model, and remembers what it has learnt of its layers.

    Attributes:
        selection: which layers are treated; what turns out to have no treatment leaves it.
        layers: what there is of each by now: one of these can no longer be left out.
        record: of the present pass, of the hooks that are on.
        proof: of the layers' samples; None before the first batch.
        uncovered: how the parameters that no treatment covers are dealt with.
        spread: embeddings of one row of ids for all samples, see `Record`.
    """

    record: Record

    def __init__(self, task: Task, selection: Selection, layers: Mapping[str, LayerFit]) -> None:
        self.task, self.selection, self.layers = task, selection, layers
        self.proof: Proof | None = None
        self.uncovered = Uncovered()
        self.spread: set[str] = set()

    def read(self, reading: Reading) -> None:
        """Hand over the samples of all layers that the batch reaches and that are not settled.

        Raises:
            ValueError: outputs, inputs or gradients that are no good, or a layer that earlier
                batches gave a state, and that has no treatment in this one.
        """
        self._prove_first(reading)
        outputs = self._forward(reading.inputs, reading.seed)
        directions = reading.directions(outputs)
        self._look(outputs)
        late = self._derivatives(outputs, directions, reading)
        del outputs  # and with it the graph
        if late:
            self._take_late(late, reading)

    def _prove_first(self, reading: Reading) -> None:
        """Before the first batch: check what samples are, on a few of its samples."""
        if self.proof is not None:
            return
        self.proof = Proof()
        if self.task.verify:
            with buffers_kept(self._model.modules()):
                self._prove(reading, whole=self.is_sharded)
        self.selection.settle()

    @property
    def _model(self) -> nn.Module:
        return self.task.model

    @cached_property
    def is_sharded(self) -> bool:
        """Whether parameters lie with several ranks, who then run forward together."""
        return is_sharded(self._model)

    def unchecked(self, name: str) -> str:
        """What of a layer's samples was taken on trust, see `Report`."""
        if not self.task.verify and name not in self.selection.loose:
            return "rows and sums"
        return "sums" if self.proof is not None and name in self.proof.unsummed else ""

    def _forward(self, inputs: Any, seed: int) -> Tensor:
        self.record.clear()
        self.record.spread = self.spread
        self.record.count = _count(inputs) if self.spread else 0
        with advised("the forward pass", "use smaller batches"):
            # Whatever the forward pass draws is a function of seed and batch, on every pass.
            device = next(self._model.parameters()).device
            with seeded(seed, cuda=device.type == "cuda"), callers():
                outputs = (self.task.predict or called)(self._model, inputs)
            outputs = checked_outputs(outputs, inputs)
        self.record.closed = True
        if not finite(outputs.detach()):
            raise ValueError(self.record.first_not_finite() or "the model's outputs are not finite")
        return outputs

    def _look(self, outputs: Tensor) -> None:
        """Find where derivatives are needed; layers found to have no treatment are left out."""
        graph, record, selection = Graph(outputs), self.record, self.selection
        for name, reason in untreatable(graph, record, self.layers).items():
            if name in selection.layers:
                self._drop(name, reason)
        if not self.task.verify:
            for name, calls in record.calls.items():
                if name in selection.layers and not fitting(calls, len(outputs)):
                    self._drop(name, unfitting(calls, len(outputs)))
        known = selection.layers.keys() | selection.watched.keys()
        for name in record.calls.keys() - known:
            del record.calls[name]
        for name in [n for n in selection.layers if n not in record.calls]:
            if any(map(graph.uses, selection.layer(name).parameters.values())):
                self._drop(name, UNCALLED)
        settled = {name for name, layer in self.layers.items() if layer.settled}
        for name in settled & record.calls.keys():
            del record.calls[name]  # no derivative is needed by what it put out
        for name in record.calls:
            held = selection.layer(name).parameters.values()
            record.uses[name] = tuple(graph.uses(parameter) for parameter in held)
        record.loose = {n: each for n, each in selection.loose.items() if n not in settled}
        if record.loose:
            record.find_precision(outputs, graph)
        record.find_passed(graph)

    def _drop(self, name: str, reason: str) -> None:
        if name in self.layers:
            raise ValueError(f"layer {name!r}: {reason}")
        self.selection.drop(name, reason)

    def _refuse(self, name: str, reason: str) -> None:
        if name in self.layers:
            raise ValueError(f"layer {name!r}: {reason}")
        self.selection.skip(name, reason)

    def _prove(self, reading: Reading, *, whole: bool, only: Container[str] = ()) -> Findings:
        """Check the layers' samples on a forward pass of their own, see `kfoc.model.proof`.

        Args:
            whole: on the batch as it is; otherwise a few samples are enough.
            only: the layers to check; all of them where there are none.
        """
        outputs = None
        part = None if whole else first_samples(reading.inputs, *FEW)
        if part is not None:
            # A model may want its batch whole: graphs, fixed sizes.
            with suppress(Exception):
                outputs = self._forward(part, reading.seed)
        if outputs is None:
            part, outputs = None, self._forward(reading.inputs, reading.seed)
        if not only:
            outputs = self._spread_out(outputs, reading.inputs if part is None else part, reading)
        self._look(outputs)
        names = [name for name in self.record.calls if not only or name in only]
        findings = check(outputs, self.record, self.selection, names)
        if self.is_sharded:  # passes for owners would have to be the same on all ranks
            findings.refuse_scattered()
        assert self.proof is not None
        self.proof.take(findings, self.record, len(outputs))
        fresh = set(self.selection.watched)
        for name, reason in findings.reasons.items():
            if name not in fresh:
                self._drop(name, reason)
        self.selection.promote(fresh & findings.rules.keys())
        self.record.clear()
        return findings

    def _spread_out(self, outputs: Tensor, inputs: Any, reading: Reading) -> Tensor:
        """Find large embeddings of one row of ids for all samples; the outputs of the pass by then.

        Such rows belong to no sample, and small embeddings go by per-sample gradients. Laid out
        for each sample they can be treated, if the model's outputs stay the same.
        """
        count = len(outputs)
        self.spread |= {
            name
            for name, calls in self.record.calls.items()
            if isinstance(module := self.selection.layer(name).module, nn.Embedding)
            and module.weight.numel() > LOOSE_LIMIT
            and all(call.value.ndim == 2 and len(call.value) == 1 < count for call in calls)
        }
        if not self.spread or self.is_sharded:  # whose forward passes are a matter of all ranks
            self.spread.clear()
            return outputs
        expected = Mark.of(outputs)
        del outputs
        with suppress(Exception):  # of a model that wants one row
            found = self._forward(inputs, reading.seed)
            if Mark.of(found).same(expected):
                return found
        self.spread.clear()
        return self._forward(inputs, reading.seed)

    def _derivatives(
        self, outputs: Tensor, directions: Cotangents, reading: Reading
    ) -> dict[str, Late]:
        """Backward passes, and all layers' samples; returns what has to be checked first."""
        record, count, late = self.record, len(outputs), dict[str, Late]()
        loose, assured = list(record.loose), self._assured(count)
        reading.reached |= record.calls.keys()
        scattered = [n for n, rules in assured.items() if any(map(is_scattered, rules or ()))]
        tagged = tagged_gradients(outputs, directions(), record, scattered) if scattered else {}

        def take(name: str, grads: Directions) -> None:
            calls, rules = record.calls.pop(name), assured[name]
            if rules is None or seen_anew(rules, calls, grads):
                late[name] = calls, grads
                return
            self._take(name, (calls, grads), rules, tagged.pop(name, None), count, reading)

        with advised("the backward pass", "use smaller batches, or fewer layers by layers=..."):
            early = take if reading.at_once else None
            grads = output_gradients(outputs, directions(), record, early)
        # Loose parameters first: they may need the graph.
        if loose:
            totals = {name: grads.pop(name) for name in loose}
            self._take_loose(totals, outputs, directions, reading)
        for name in list(grads):
            take(name, grads.pop(name))
        return late

    def _assured(self, count: int) -> dict[str, tuple[Rule, ...] | None]:
        """Every called layer's rules; None where its calls have not been checked."""
        calls = self.record.calls
        if not self.task.verify:
            return {name: (InOrder(),) * len(each) for name, each in calls.items()}
        assert self.proof is not None
        return {name: self.proof.known(name, self.record, count) for name in calls}

    def _take(
        self,
        name: str,
        found: Late,
        rules: tuple[Rule, ...],
        tagged: Tagged | None,
        count: int,
        reading: Reading,
    ) -> None:
        with advised(f"layer {name!r}", LESS_MEMORY):
            reading.take(name, take_samples(name, *found, count, rules, tagged))

    def _take_late(self, late: dict[str, Late], reading: Reading) -> None:
        """Take in layers whose calls were never checked before, after a check on this batch."""
        if self.is_sharded:  # forward passes are a matter of all ranks
            for name in late:
                self._refuse(name, "it is called in another way than when it was checked")
            return
        before = set(self.selection.loose)
        with buffers_kept(self._model.modules()):
            findings = self._prove(reading, whole=True, only=late)
        for name, (calls, grads) in late.items():
            if name not in findings.rules:
                reading.reached.discard(name)
                continue
            rules = findings.rules[name]
            if seen_anew(rules, calls, grads):
                raise ValueError(f"layer {name!r}: {UNSURE}")
            self._take(name, (calls, grads), rules, None, findings.count, reading)
        fresh = self.selection.loose.keys() - before
        if fresh:  # what is no layer after all has no derivatives yet
            with buffers_kept(self._model.modules()):
                outputs = self._forward(reading.inputs, reading.seed)
                self.record.calls.clear()
                self.record.loose = {name: self.selection.loose[name] for name in fresh}
                self._derivatives(outputs, reading.directions(outputs), reading)

    def _take_loose(
        self,
        totals: dict[str, Directions],
        outputs: Tensor,
        directions: Cotangents,
        reading: Reading,
    ) -> None:
        """Take in the parameters that no treatment covers, by per-sample gradients one by one."""
        record = self.record
        wanted: dict[str, dict[str, nn.Parameter]] = {}
        for name, each in totals.items():
            if all(grad is None for per_parameter in each for grad in per_parameter):
                continue
            wanted[name] = record.loose[name]
            try:
                check_size(wanted[name], len(each[0]), len(outputs))
            except Unsupported as reason:
                self._refuse(name, str(reason))
                del wanted[name]
        if not wanted:
            return
        named = {
            key: grads
            for name, parameters in wanted.items()
            for key, grads in zip(parameters, totals[name], strict=True)
        }
        how = outputs, directions, record.precision
        batch = Batch(self._model, self.task.predict, reading.inputs, *how)
        parameters = {key: p for each in wanted.values() for key, p in each.items()}
        record.paused = True
        try:
            found, off = self.uncovered.samples(batch, parameters, named)
        finally:
            record.paused = False
        for name, own in wanted.items():
            wrong = next((key for key in own if key in off), None)
            if wrong is not None:
                self._refuse(name, UNSUMMED.format(wrong))
                continue
            samples = Direct(torch.cat([found[key] for key in own], 2)[..., None])
            reading.reached.add(name)
            reading.take(name, checked_finite(name, samples))


def _count(inputs: Any) -> int:
    """Of the samples, 0 where the inputs do not say."""
    try:
        return count_samples(inputs)
    except ValueError:
        return 0
