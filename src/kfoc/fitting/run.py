"""The one loop over data: batches through the model, layers to the estimator."""

from __future__ import annotations

import copy
from collections.abc import Callable, Container, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from kfoc.blocks import Block
from kfoc.common.ambient import as_called, callers
from kfoc.common.threads import seeded
from kfoc.curvature.curvature import Curvature
from kfoc.distributed import Ranks
from kfoc.distributed.agreement import pool, sharded
from kfoc.errors import Footprint, advised, naming, within
from kfoc.estimators import Estimator
from kfoc.estimators.base import State
from kfoc.estimators.certificate import Probes
from kfoc.fitting.options import check_options, counts
from kfoc.fitting.ranges import check_range
from kfoc.layers.rule import Unsupported
from kfoc.layers.selection import Selection, select
from kfoc.likelihoods.base import Likelihood
from kfoc.likelihoods.named import resolved
from kfoc.linalg.scaling import finite, squared
from kfoc.model.backward import (
    Tagged,
    checked_finite,
    output_gradients,
    tagged_gradients,
    take_samples,
)
from kfoc.model.batches import Predict, called, check_next_token, checked_outputs, moved, unpacked
from kfoc.model.buffers import buffers_kept
from kfoc.model.functional import first_samples
from kfoc.model.graph import Graph
from kfoc.model.hooks import captured
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
from kfoc.model.trace import Call, Record
from kfoc.model.uncovered import UNSUMMED, Batch, Uncovered, check_size
from kfoc.model.undisturbed import undisturbed
from kfoc.parameters.coverage import parameter_counts
from kfoc.running.by_layers import Sweeps
from kfoc.running.checkpointed import Keeper
from kfoc.running.marks import Mark
from kfoc.running.progress import Meter, Progress, length
from kfoc.samples.base import LayerSamples
from kfoc.samples.direct import Direct


def streaming(
    model: nn.Module,
    likelihood: str | Likelihood,
    estimator: Estimator,
    fisher: str,
    mc_samples: int,
    layers: str | Iterable[str] | None,
    predict: Predict | None,
    seed: int,
    decay: float,
) -> Run:
    """A fit without an end, to be fed by `Run.stream`; the arguments are those of `fit`.

    Before each batch, all earlier ones count `decay` times.
    """
    check_options(model, estimator, fisher, predict)
    mc_samples, _, seed = counts(mc_samples, 0, seed)
    if estimator.pass_limit > 1:
        raise ValueError(
            f"{estimator} needs several passes over the data, and a stream has one: use "
            "kfoc.KFOC(), kfoc.KFAC() or kfoc.Diagonal()"
        )
    selection = select(model, layers, estimator.largest_factor)
    chosen = resolved(likelihood)
    run = Run(model, chosen, estimator, fisher, mc_samples, predict, 0, seed, selection)
    run.decay = decay
    return run


# A layer's calls and derivatives that wait for a check.
Late = tuple[list[Call], Directions]


@dataclass
class _Work:
    """One batch that is being taken in.

    Attributes:
        inputs, targets: on the model's device.
        number: of the batch in this pass.
        first: of the draws: its first sample's number in the data of all ranks.
        index: its first sample's number in this rank's.
        alone: whether it is all of the data.
        reached: blocks that have gradients for its samples.
    """

    inputs: Any
    targets: Any
    number: int
    first: int
    index: int
    alone: bool
    reached: set[str] = field(default_factory=set)


@dataclass
class Run:
    """One fit: its configuration, and the state of every layer between batches."""

    model: nn.Module
    likelihood: Likelihood
    estimator: Estimator
    fisher: str
    mc_samples: int
    predict: Predict | None
    num_probes: int
    seed: int
    selection: Selection
    states: dict[str, State] = field(default_factory=dict)
    settled: set[str] = field(default_factory=set)
    probes: dict[str, Probes] = field(default_factory=dict)
    shapes: dict[str, LayerSamples] = field(default_factory=dict)
    scales: dict[str, tuple[float, float]] = field(default_factory=dict)  # largest inputs, grads
    num_samples: int = 0
    passes: int = 0
    decay: float | None = None  # of a stream, and so the three below
    weight: float = 0.0  # of the samples so far, when the next ones count 1
    batches: int = 0
    updates: int = 0  # of any layer's state: whether a failed batch left traces
    marks: list[Mark] = field(default_factory=list)
    verify: bool = True
    proof: Proof | None = None  # from the first batch on
    uncovered: Uncovered = field(default_factory=Uncovered)
    ranks: Ranks | None = None  # of a distributed fit, and so the next
    read: int = 0  # samples in this pass, before the present batch
    sweeps: Sweeps | None = None  # where layers are fitted in groups
    # Layers whose iteration ended at its limit, with the last change of sigma, where it is known.
    unsettled: dict[str, float | None] = field(default_factory=dict)

    def through(
        self, data: Iterable[Any], report: Callable[[Progress], Any] | None, keeper: Keeper
    ) -> Curvature:
        """Pass over the data until no layer needs it any more."""
        if self.sweeps:
            self.marks = self.sweeps.marks
        modules = self.selection.every.values()
        with undisturbed(modules), captured(self.selection) as record:
            done = keeper.restored(self, data)
            while not done:
                number = self.one_pass(data, record, report, keeper)
                done = self.done()
                keeper.after_pass(self, self.num_samples, number, done)
            return self.finished()

    @property
    def by_graph(self) -> bool:
        """What `Uncovered` has learnt: part of a state, so that a resumed fit goes the same way."""
        return self.uncovered.by_graph

    @by_graph.setter
    def by_graph(self, found: bool) -> None:
        self.uncovered.by_graph = found

    @cached_property
    def sized(self) -> Estimator:
        """The estimator, for this model."""
        return self.estimator.sized(
            {name: self.selection.layout(name) for name in self.selection.modules}
        )

    @cached_property
    def is_sharded(self) -> bool:
        return sharded(self.model)

    @property
    def _drawn(self) -> bool:
        """Whether F is one of drawn labels, which others could have been."""
        return self.fisher.startswith("mc")

    @property
    def _draws_more(self) -> bool:
        """Whether the probes take draws of their own now."""
        return self._drawn and bool(self.num_probes) and not self.passes

    @property
    def earlier(self) -> int:
        """How many passes over the data there were before this one."""
        return self.passes + (self.sweeps.passes if self.sweeps else 0)

    def one_pass(
        self,
        data: Iterable[Any],
        record: Record,
        report: Callable[[Progress], Any] | None,
        keeper: Keeper,
    ) -> int:
        """Take in all batches, or those that a checkpoint had not; returns the number of all."""
        if self.ranks:
            self.ranks.start()
        batches = as_called(data)
        index, number = keeper.begun(batches)
        meter = self._meter(data, report, keeper.spent) if report else None
        batch = next(batches, _END)
        while batch is not _END:
            # One ahead: a data set of a single batch gets that batch's optimum.
            following = next(batches, _END)
            alone = number == 0 and following is _END and self.ranks is None
            keeper.saw(batch)
            with within(f"batch {number}"):
                index += self._batch(batch, record, index, number, alone)
            batch, number = following, number + 1
            self.read = index
            if meter:
                meter.show(number, index, last=following is _END)
            if following is not _END:
                keeper.after_batch(self, index, number)
        while self.ranks and self.ranks.others_go_on():
            pass
        samples = self.ranks.samples if self.ranks else index
        if not samples:
            raise ValueError(f"data has no batches (pass {self.earlier + 1})")
        if self.earlier and number != len(self.marks):
            raise ValueError(
                f"pass {self.earlier + 1} over the data had {number} batches where the first had "
                f"{len(self.marks)}: several passes need the same batches each time"
            )
        if self.ranks:
            pool(self.ranks, self)
        self.num_samples, self.passes, self.read = samples, self.passes + 1, 0
        return number

    def adopt(self, name: str, silent: LayerSamples) -> None:
        """Begin the state of a layer that other ranks' samples reached, and none of this one's."""
        self._begin(name, silent)
        if self.read:
            self._update(name, silent.silent(self.read), 0, False)

    def _begin(self, name: str, samples: LayerSamples) -> bool:
        """Make the state of a layer; False where a later sweep does."""
        self.shapes[name] = samples.silent(0)
        if self.sweeps and not self.sweeps.takes(name, lambda: self._footprint(samples)):
            self.settled.add(name)
            return False
        self.states[name] = self.sized.begin(name, samples)
        if self.num_probes:
            self.probes[name] = Probes(self.num_probes, self.seed, name, samples, self._drawn)
        return True

    def _meter(self, data: Iterable[Any], report: Callable[[Progress], Any], spent: float) -> Meter:
        changes = [state.change() for state in self.states.values()]
        known = [change for change in changes if change is not None]
        batches = len(self.marks) if self.earlier else length(data)
        limit = self.earlier - self.passes + self.estimator.pass_limit
        meter = Meter(report, self.earlier + 1, limit, batches, max(known, default=None))
        meter.start -= spent
        return meter

    def _batch(self, batch: Any, record: Record, index: int, number: int, alone: bool) -> int:
        """Take in one batch, whose first sample is the `index`-th; returns its sample count."""
        try:
            check_next_token(self.model, batch, self.predict)
            inputs, targets = unpacked(batch)
            device = next(self.model.parameters()).device
            inputs, targets = moved(inputs, device), moved(targets, device)
            if self.proof is None:
                self.proof = Proof()
                if self.verify:
                    with buffers_kept(self.model.modules()):
                        self._prove(inputs, record, number, whole=self.is_sharded)
                self.selection.settle()
            outputs = self._forward(inputs, record, number)
            count = outputs.shape[0]
            self._check_same(outputs, targets, number)
            self._look(outputs, record)
            with advised("the backward pass", "use smaller batches, or fewer layers by layers=..."):
                first = self.ranks.first_index(count) if self.ranks else index
            work = _Work(inputs, targets, number, first, index, alone)
            late = self._derivatives(outputs, record, work)
            del outputs  # and with it the graph
            if late:
                self._take_late(late, record, work)
            self._silent(self.settled | work.reached, count)
        except ValueError as error:
            if type(error) is not ValueError:  # the user's own
                raise
            raise ValueError(f"batch {number}: {error}") from error
        return count

    def _forward(self, inputs: Any, record: Record, number: int) -> Tensor:
        record.clear()
        with advised("the forward pass", "use smaller batches"):
            outputs = self._outputs(inputs, number)
        record.closed = True
        if not finite(outputs.detach()):
            raise ValueError(record.first_not_finite() or "the model's outputs are not finite")
        return outputs

    def _look(self, outputs: Tensor, record: Record) -> None:
        """Find where derivatives are needed; layers found to have no treatment are left out."""
        graph = Graph(outputs)
        for name, reason in untreatable(graph, record, self.shapes).items():
            if name in self.selection.modules:
                self._drop(name, reason)
        if not self.verify:
            for name, calls in record.calls.items():
                if name in self.selection.modules and not fitting(calls, len(outputs)):
                    self._drop(name, unfitting(calls, len(outputs)))
        known = self.selection.modules.keys() | self.selection.watched.keys()
        for name in record.calls.keys() - known:
            del record.calls[name]
        for name in [n for n in self.selection.modules if n not in record.calls]:
            if any(map(graph.uses, self.selection.layer_parameters(name).values())):
                self._drop(name, UNCALLED)
        for name in self.settled & record.calls.keys():
            del record.calls[name]  # no derivative is needed by what it put out
        for name in record.calls:
            held = self.selection.layer_parameters(name).values()
            record.uses[name] = tuple(graph.uses(parameter) for parameter in held)
        loose = self.selection.loose
        record.loose = {name: loose[name] for name in loose if name not in self.settled}
        if record.loose:
            record.find_precision(outputs, graph)
        record.find_passed(graph)

    def _drop(self, name: str, reason: str) -> None:
        if name in self.shapes:
            raise ValueError(f"layer {name!r}: {reason}")
        self.selection.drop(name, reason)

    def _prove(
        self, inputs: Any, record: Record, number: int, *, whole: bool, only: Container[str] = ()
    ) -> Findings:
        """Check the layers' samples on a forward pass of their own, see `kfoc.model.proof`.

        Args:
            whole: on the batch as it is; otherwise a few samples are enough.
            only: the layers to check; all of them where there are none.
        """
        outputs = None
        part = None if whole else first_samples(inputs, *FEW)
        if part is not None:
            # A model may want its batch whole: graphs, fixed sizes.
            with suppress(Exception):
                outputs = self._forward(part, record, number)
        if outputs is None:
            outputs = self._forward(inputs, record, number)
        self._look(outputs, record)
        names = [name for name in record.calls if not only or name in only]
        findings = check(outputs, record, self.selection, names)
        if self.is_sharded:  # passes for owners would have to be the same on all ranks
            findings.refuse_scattered()
        assert self.proof is not None
        self.proof.take(findings, record, len(outputs))
        fresh = self.selection.watched.keys() - self.selection.modules.keys()
        for name, reason in findings.reasons.items():
            if name not in fresh:
                self._drop(name, reason)
        self.selection.promote(fresh & findings.rules.keys())
        record.clear()
        return findings

    def _derivatives(self, outputs: Tensor, record: Record, work: _Work) -> dict[str, Late]:
        """Backward passes, and all layers' samples; returns what has to be checked first."""
        late: dict[str, Late] = {}
        count = len(outputs)
        loose, assured = list(record.loose), self._assured(record, count)
        work.reached |= record.calls.keys()

        def directions() -> Iterator[Tensor]:
            return self._cotangents(outputs, work)

        scattered = [n for n, rules in assured.items() if any(map(is_scattered, rules or ()))]
        tagged = tagged_gradients(outputs, directions(), record, scattered) if scattered else {}

        def take(name: str, grads: Directions) -> None:
            calls, rules = record.calls.pop(name), assured[name]
            if rules is None or seen_anew(rules, calls, grads):
                late[name] = calls, grads
                return
            self._take(name, calls, grads, rules, tagged.pop(name, None), count, work)

        with advised("the backward pass", "use smaller batches, or fewer layers by layers=..."):
            # A sweep chooses its layers in the order of the model: all of them come first.
            early = take if self.states or not self.sweeps else None
            grads = output_gradients(outputs, directions(), record, early)
        # Loose parameters first: they may need the graph.
        if loose:
            totals = {name: grads.pop(name) for name in loose}
            self._take_loose(totals, outputs, directions, record, work)
        for name in list(grads):
            take(name, grads.pop(name))
        return late

    def _assured(self, record: Record, count: int) -> dict[str, tuple[Rule, ...] | None]:
        """Every called layer's rules; None where its calls have not been checked."""
        if not self.verify:
            return {name: (InOrder(),) * len(calls) for name, calls in record.calls.items()}
        assert self.proof is not None
        return {name: self.proof.known(name, record, count) for name in record.calls}

    def _take(
        self,
        name: str,
        calls: list[Call],
        grads: Directions,
        rules: tuple[Rule, ...],
        tagged: Tagged | None,
        count: int,
        work: _Work,
    ) -> None:
        with advised(f"layer {name!r}", _LESS_MEMORY):
            samples = take_samples(name, calls, grads, count, rules, tagged)
            self._take_in(name, samples, work)

    def _take_late(self, late: dict[str, Late], record: Record, work: _Work) -> None:
        """Take in layers whose calls were never checked before, after a check on this batch."""
        if self.is_sharded:  # forward passes are a matter of all ranks
            for name in late:
                self._refuse(name, "it is called in another way than when it was checked")
            return
        before = set(self.selection.loose)
        with buffers_kept(self.model.modules()):
            findings = self._prove(work.inputs, record, work.number, whole=True, only=late)
        for name, (calls, grads) in late.items():
            if name not in findings.rules:
                work.reached.discard(name)
                continue
            rules, count = findings.rules[name], findings.count
            if seen_anew(rules, calls, grads):
                raise ValueError(f"layer {name!r}: {UNSURE}")
            self._take(name, calls, grads, rules, None, count, work)
        fresh = self.selection.loose.keys() - before
        if fresh:  # what is no layer after all has no derivatives yet
            with buffers_kept(self.model.modules()):
                outputs = self._forward(work.inputs, record, work.number)
                record.calls.clear()
                record.loose = {name: self.selection.loose[name] for name in fresh}
                self._derivatives(outputs, record, work)

    def _take_loose(
        self,
        totals: dict[str, Directions],
        outputs: Tensor,
        directions: Callable[[], Iterator[Tensor]],
        record: Record,
        work: _Work,
    ) -> None:
        """Take in the parameters that no treatment covers, by per-sample gradients one by one."""
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
        batch = Batch(self.model, self.predict, work.inputs, *how)
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
            work.reached.add(name)
            self._take_in(name, checked_finite(name, samples), work)

    def _take_in(self, name: str, samples: LayerSamples, work: _Work) -> None:
        """Let the block see all directions, but for the draws that are for its probes alone."""
        if not self._draws_more:
            self._update(name, samples, work.index, work.alone)
            return
        own = samples.num_directions - len(_UNSEEN)
        self._update(name, samples.of_directions(slice(own)), work.index, work.alone)
        if name in self.probes:  # it is not where a later sweep takes the layer
            self.probes[name].add_unseen(samples.of_directions(slice(own, None)), work.first)

    def _refuse(self, name: str, reason: str) -> None:
        if name in self.shapes:
            raise ValueError(f"layer {name!r}: {reason}")
        self.selection.skip(name, reason)

    def _outputs(self, inputs: Any, number: int) -> Tensor:
        # Whatever the forward pass draws is a function of seed and batch, on every pass.
        if self.ranks:  # which take turns, were it one process
            number = number * self.ranks.world + self.ranks.rank
        seed = (self.seed * 1_000_003 + number) % 2**63
        device = next(self.model.parameters()).device
        with seeded(seed, cuda=device.type == "cuda"), callers():
            outputs = (self.predict or called)(self.model, inputs)
        return checked_outputs(outputs, inputs)

    def _cotangents(self, outputs: Tensor, work: _Work) -> Iterator[Tensor]:
        values = outputs.detach()
        values = values.float() if values.element_size() < 4 else values
        self.likelihood = self.likelihood.settled(values, work.targets)
        draws = [(self.mc_samples, self.seed)]
        if self._draws_more:
            draws += [(1, self.seed ^ key) for key in _UNSEEN]
        return (
            cotangent.to(outputs)
            for count, seed in draws
            for cotangent in self.likelihood.cotangents(
                values, work.targets, self.fisher, count, seed, work.first
            )
        )

    def _check_same(self, outputs: Tensor, targets: Any, number: int) -> None:
        """Several passes must see the same batches; their outputs tell when they do not."""
        if self.estimator.pass_limit == 1 and not self.sweeps:
            return
        mark = Mark.of(outputs, targets if self.fisher == "empirical" else None)
        if not self.earlier:
            self.marks.append(mark)
        elif number >= len(self.marks) or not self.marks[number].same(mark):
            raise ValueError(
                f"pass {self.earlier + 1} does not see what the first pass saw: several passes "
                "need the same batches each time (DataLoader: shuffle=False, no random "
                "augmentation)"
            )

    def _update(self, name: str, samples: LayerSamples, index: int, alone: bool) -> None:
        if name not in self.states:
            if not self._begin(name, samples):
                return
            if index:  # the layer was not reached by the samples before: their gradients are zero
                self._update(name, samples.silent(index), 0, False)
                if self.decay is not None and self.weight != index:
                    self.states[name].decay(self.weight / index)
        if type(samples) is not type(self.shapes[name]):
            raise ValueError(
                f"layer {name!r}: it is called in another way than in the batches before (as "
                "self-attention and as cross-attention?)"
            )
        if self.num_probes and not self.passes:
            self.probes[name].add(samples)
        self.updates += 1
        self._note_scale(name, samples)
        self.states[name].add(samples, alone)

    def _note_scale(self, name: str, samples: LayerSamples) -> None:
        """What tells numbers that vanished from zeros."""
        before, found = self.scales.get(name, (0.0, 0.0)), samples.magnitudes
        self.scales[name] = max(before[0], found[0]), max(before[1], found[1])
        if all(found):
            with naming(name):
                squared(found[0] * found[1])

    def _footprint(self, samples: LayerSamples) -> Footprint:
        o, i = samples.shape
        each = 4 if self._drawn else 2
        probes = each * self.num_probes * o * i * samples.grads.element_size()
        return self.sized.footprint(samples) + Footprint(probes, 0)

    def _silent(self, reached: set[str], count: int) -> None:
        """Layers that this batch did not reach have zero gradients for its samples."""
        for name in self.states.keys() - reached:
            self._update(name, self.shapes[name].silent(count), 0, False)

    def stream(self, batch: Any) -> None:
        """Take in one more batch."""
        modules = list(self.model.modules())  # there may be new ones
        with undisturbed(modules), captured(self.selection) as record:
            count = self._batch(batch, record, self.num_samples, self.batches, False)
            self.num_samples, self.batches = self.num_samples + count, self.batches + 1
            self.weight += count
            # Now and not before the next batch, which may turn out to be no good.
            if self.decay is not None and self.decay != 1:
                self.weight *= self.decay
                for state in self.states.values():
                    state.decay(self.decay)

    def snapshot(self) -> Curvature:
        """The curvature of the stream so far; the states stay as they are."""
        blocks = {}
        skipped = dict(self.selection.skipped)
        for name in self.selection.blocks:
            if name in self.states:
                # A copy of one layer at a time: what finishes a state may change it.
                with naming(name):
                    block = copy.deepcopy(self.states[name]).block(self.weight)
                check_range(name, block, self.scales.get(name, (0.0, 0.0)))
                blocks[name] = block
            else:
                skipped[name] = "its forward was never called"
        layouts = {name: self.selection.layout(name) for name in blocks}
        origin = repr(self.estimator), self.fisher, self.seed, parameter_counts(self.model)
        count = max(1, round(self.weight / (self.decay or 1)))
        return Curvature(blocks, count, layouts, skipped, *origin)

    def done(self) -> bool:
        """Hand every layer to its next pass; True where none needs one."""
        for name in self.states.keys() - self.settled:
            with advised(f"layer {name!r}", _LESS_MEMORY), naming(name):
                settled = self.states[name].next_pass()
            if settled:
                self.settled.add(name)
        return self.states.keys() <= self.settled or self.passes >= self.estimator.pass_limit

    def finished(self) -> Curvature:
        for name in [name for name in self.selection.blocks if name not in self.shapes]:
            loose = name in self.selection.loose
            reason = "no output depends on it" if loose else "its forward was never called"
            if loose and self.is_sharded:
                reason = "there are no per-sample gradients of sharded parameters one by one"
            self.selection.skip(name, reason)
        if not self.shapes:
            raise ValueError(f"no layer can be treated: {self.selection.skipped}")
        # Those of the sweeps so far: other layers wait for a sweep to come.
        done = self.sweeps.blocks if self.sweeps else {}
        names = self.selection.blocks
        for name in names:
            if name in self.states:
                block = self._finished(name)
                done[name] = self.sweeps.kept(name, block) if self.sweeps else block
                del block
        blocks = {name: done[name] for name in names if name in done}
        layouts = {name: self.selection.layout(name) for name in blocks}
        origin = repr(self.estimator), self.fisher, self.seed, parameter_counts(self.model)
        return Curvature(blocks, self.num_samples, layouts, self.selection.skipped, *origin)

    def _finished(self, name: str) -> Block:
        # A layer at a time: states and blocks together would take the memory twice.
        with advised(f"layer {name!r}", _LESS_MEMORY), naming(name):
            state = self.states.pop(name)
            change = state.change()
            block = state.block(self.num_samples)
        if not block.report.converged:
            self.unsettled[name] = change
        check_range(name, block, self.scales.get(name, (0.0, 0.0)))
        if self.num_probes:
            block = self.probes.pop(name).certified(block, self.num_samples)
        known = block.report
        if not self._drawn:
            known = replace(
                known, fisher_error=known.relative_error, fisher_error_std=known.standard_error
            )
        known = replace(known, unchecked=self._unchecked(name))
        return block if known == block.report else replace(block, report=known)

    def _unchecked(self, name: str) -> str:
        """What of a layer's samples was taken on trust, see `Report`."""
        if not self.verify and name not in self.selection.loose:
            return "rows and sums"
        return "sums" if self.proof is not None and name in self.proof.unsummed else ""


_END = object()


# What makes seeds of their own, far from the user's, for the two draws that no block sees.
_UNSEEN = 0x2545F4914F6CDD1D, 0x369DEA0F31A53F85
_LESS_MEMORY = (
    "use smaller batches, a smaller memory_limit or buffer of kfoc.KFOC, or leave the layer out by "
    "layers=..."
)
