"""The one loop over data: batches through the model, layers to the estimator."""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from kfoc.agreement import check_same, pool, sharded, synchronise, unwrapped
from kfoc.ambient import as_called, callers, plainly
from kfoc.batches import (
    Mark,
    Predict,
    called,
    check_next_token,
    checked_outputs,
    moved,
    unpacked,
)
from kfoc.blocks import Block, GroupedBlock, KroneckerBlock
from kfoc.capture import Directions, Take, captured, output_gradients, take_samples
from kfoc.certificate import Probes
from kfoc.checkpoint import Checkpoint, Keeper
from kfoc.checks import untreatable
from kfoc.coverage import parameter_counts
from kfoc.curvature import Curvature
from kfoc.distributed import Ranks
from kfoc.estimators import KFOC, Estimator
from kfoc.graph import Graph
from kfoc.layers import Unsupported, own_parameters
from kfoc.likelihoods import FISHER_TYPES, Likelihood, resolved
from kfoc.memory import Footprint, advised, within
from kfoc.offload import Sweeps
from kfoc.per_sample import Regions
from kfoc.progress import Meter, Progress, length, reporter
from kfoc.record import Record
from kfoc.samples import LayerSamples, finite
from kfoc.selection import Selection, select
from kfoc.threads import UNCOMPILED, random_state_kept, seeded


@plainly
def fit(
    model: nn.Module,
    data: Iterable[Any],
    likelihood: str | Likelihood = "categorical",
    *,
    estimator: Estimator | None = None,
    fisher: str = "mc",
    mc_samples: int = 1,
    layers: str | Iterable[str] | None = None,
    predict: Predict | None = None,
    probes: int = 0,
    seed: int = 0,
    progress: bool | Callable[[Progress], Any] = False,
    group: Any = None,
    checkpoint: Checkpoint | str | os.PathLike[str] | None = None,
    resume: bool = False,
    memory_budget: int | None = None,
    storage: str | Path | None = None,
) -> Curvature:
    """Estimate the Fisher information of a model, one block per layer, from a pass over data.

    The model runs in the mode it is in (call `model.eval()` first, as a rule) and comes back as it
    was; so does the global random state. Dropout in train mode draws masks that depend on `seed`
    and the batch's number alone.

    Parameters that no layer's treatment covers (class tokens, scales, recurrent layers, layers that
    do not run over the samples or are used in other ways) get a block by module, from per-sample
    gradients one by one: exact, up to 65,536 parameters in all, and a dense or diagonal block. That
    costs up to one backward pass per sample and direction, from where they meet the samples down to
    them, and two of the model in the first batch. What has no block is in `Curvature.skipped`.

    Args:
        model: any module whose outputs have the samples first, each dependent on its own inputs.
        data: batches `(inputs, targets)`, or mappings (dict, transformers' BatchEncoding),
            dataclasses or NamedTuples with their targets under "labels", which the model does not
            get: the loss is formed here. Inputs are a tensor, a tuple or list that the model is
            called with in order, a mapping, dataclass or NamedTuple that it is called with by
            name, or whatever `predict` takes; tensors in them are moved to the model's device.
            Targets may be missing or None for `fisher="mc"` and `"exact"`. Labels are compared
            with the outputs as they stand: for a model of the next token, drop the last outputs
            in `predict` and the first labels in `data`.
        likelihood: "categorical" (logits), "gaussian" (unit variance), "bernoulli" (logits), or a
            `Likelihood`.
        estimator: KFOC() by default; KFAC(), Diagonal(), BlockDiagonal().
        fisher: "mc" (labels drawn from the model), "exact" (expectation over the model's labels)
            or "empirical" (the observed labels).
        mc_samples: draws per sample, for "mc".
        layers: names or patterns (`fnmatch`) of the layers to treat; None: all that can be. One
            that is named and cannot be treated is an error.
        predict: `(model, inputs) -> outputs`, a tensor or an object with `.logits`. None: the
            model is called with the inputs; it must return one or the other.
        probes: how many Gaussian probes certify each block (`relative_error`, with its standard
            error); they take `2 * probes` weights' memory per layer. 16 is plenty.
        seed: of the draws and probes; the same seed gives the same draws for any batch size.
        progress: True: passes, samples, rate, and the time left where the data has a length, on
            standard error; or a callable that gets a `Progress` after every batch.
        group: a process group of `torch.distributed` (or `kfoc.distributed.Ranks`), whose ranks
            all call this with the same model and options, and each with its share of the data,
            of any length. All get the same curvature, that of the data of all.
        checkpoint: a directory, or a `Checkpoint` of one, to save the state of the fit to: every
            minute and after every pass. It stays when the fit has ended.
        resume: go on from the checkpoint, if there is one, to the same bits: the batches that it
            had taken in are read and dropped, so data must yield the same ones in the same order.
        memory_budget: bytes that all layers' states and finished blocks may take together in
            memory. Where they would take more, the layers are fitted in groups, one after the
            other, each with sweeps of its own over the same data. See docs/memory.md for what is
            beside it (model, batches, the work on one layer).
        storage: a directory, new or empty, for the finished blocks: their tensors then lie in
            files there, mapped to memory, and do not count against the budget. The files are
            yours, and must stay as they are while the curvature is in use.

    Returns:
        The blocks by layer name, of the mean Fisher over the samples.

    Raises:
        ValueError: bad arguments, data or values; the message names the layer and the batch.
        kfoc.distributed.RanksError: another rank failed, died, or passes other arguments.
    """
    ranks = Ranks.of(group)
    if ranks and checkpoint is not None:
        raise ValueError(
            "checkpoint: the state of a fit over several ranks cannot be saved; leave out "
            "checkpoint or group"
        )
    sweeps = Sweeps.within(memory_budget, storage, rereadable=not isinstance(data, Iterator))
    if sweeps and (ranks or checkpoint is not None):
        raise ValueError(
            "memory_budget and storage go without group and checkpoint: leave out the one or the "
            "other"
        )
    with ranks.telling() if ranks else nullcontext():
        model = unwrapped(model) if ranks else model
        options = fisher, mc_samples, predict, probes, seed
        saving = checkpoint, resume
        how = progress, saving, ranks, sweeps
        return _fitted(model, data, likelihood, estimator, options, layers, *how)


def _fitted(
    model: nn.Module,
    data: Iterable[Any],
    likelihood: str | Likelihood,
    estimator: Estimator | None,
    options: tuple[str, int, Predict | None, int, int],
    layers: str | Iterable[str] | None,
    progress: bool | Callable[[Progress], Any],
    saving: tuple[Checkpoint | str | os.PathLike[str] | None, bool],
    ranks: Ranks | None,
    sweeps: Sweeps | None,
) -> Curvature:
    fisher, mc_samples, _, probes, seed = options
    estimator = KFOC() if estimator is None else estimator
    _check_options(estimator, fisher, mc_samples, probes, seed)
    report = reporter(progress)
    chosen = resolved(likelihood)

    def begin() -> _Run:
        selection = select(model, layers, estimator.largest_factor)
        return _Run(model, chosen, estimator, *options, selection, ranks=ranks, sweeps=sweeps)

    run = begin()
    check_independent(run.selection.every.items())
    if estimator.pass_limit > 1 and isinstance(data, Iterator):
        raise ValueError(
            f"{estimator} needs several passes over the data, and an iterator can be read once: "
            "pass a list or a DataLoader"
        )
    keeper = Keeper(*saving, run)
    if ranks:
        told = {"estimator": estimator, "likelihood": type(chosen).__name__, "fisher": fisher}
        told |= {"mc_samples": mc_samples, "probes": probes, "seed": seed}
        if sharded(model):  # a forward pass is then a matter of all ranks
            told["batches in data"] = length(data)
        check_same(ranks, told, run.selection)
    if sweeps is None:
        return run.through(data, report, keeper)
    with sweeps:
        while True:
            curvature = run.through(data, report, keeper)
            if sweeps.over(run.passes, run.marks):
                return curvature
            run = begin()  # each sweep meets the layers anew, and comes to the same decisions


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
) -> _Run:
    """A fit without an end, to be fed by `_Run.stream`; the arguments are those of `fit`.

    Before each batch, all earlier ones count `decay` times.
    """
    _check_options(estimator, fisher, mc_samples, 0, seed)
    if estimator.pass_limit > 1:
        raise ValueError(
            f"{estimator} needs several passes over the data, and a stream has one: use "
            "kfoc.KFOC(), kfoc.KFAC() or kfoc.Diagonal()"
        )
    selection = select(model, layers, estimator.largest_factor)
    chosen = resolved(likelihood)
    run = _Run(model, chosen, estimator, fisher, mc_samples, predict, 0, seed, selection)
    run.decay = decay
    return run


def _check_options(
    estimator: Estimator, fisher: str, mc_samples: int, probes: int, seed: int
) -> None:
    if not isinstance(estimator, Estimator):
        raise ValueError(f"estimator must be an instance such as kfoc.KFOC(), found {estimator!r}")
    estimator.check()
    if fisher not in FISHER_TYPES:
        raise ValueError(f"fisher must be one of {', '.join(FISHER_TYPES)}, found {fisher!r}")
    if mc_samples < 1:
        raise ValueError(f"mc_samples must be at least 1, found {mc_samples}")
    if probes < 0:
        raise ValueError(f"probes must not be negative, found {probes}")
    if not -(2**63) <= seed < 2**63:
        raise ValueError(f"seed must fit 64 bits, found {seed}")


def check_independent(modules: Iterable[tuple[str, nn.Module]]) -> None:
    for name, module in modules:
        if isinstance(module, _BatchNorm) and (module.training or module.running_mean is None):
            raise ValueError(
                f"layer {name!r} normalises by the statistics of the batch, so samples are not "
                "independent and have no gradients of their own: call model.eval() (and keep "
                "track_running_stats=True)"
            )


@contextmanager
def _undisturbed(modules: Collection[nn.Module]) -> Iterator[None]:
    """Gradients on and compilation off; afterwards all is as it was, random state and buffers too.

    A compiled region is one function, whose layers nobody can watch.

    Args:
        modules: all of the model's.
    """
    buffers = [b for m in modules if m.training for b in m.buffers(recurse=False)]
    before = [buffer.clone() for buffer in buffers]
    gpus = set()
    if torch.cuda.is_initialized():  # or no parameter can be there
        held = [p for module in modules for p in own_parameters(module).values()]
        gpus = {p.device.index or 0 for p in held if p.device.type == "cuda"}
    with (
        random_state_kept(sorted(gpus)),
        torch.enable_grad(),
        UNCOMPILED,
    ):
        try:
            yield
        finally:
            if buffers:
                with torch.no_grad():
                    for buffer, value in zip(buffers, before, strict=True):
                        buffer.copy_(value)


@dataclass
class _Run:
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
    states: dict[str, Any] = field(default_factory=dict)
    settled: set[str] = field(default_factory=set)
    probes: dict[str, Probes] = field(default_factory=dict)
    shapes: dict[str, LayerSamples] = field(default_factory=dict)
    num_samples: int = 0
    passes: int = 0
    decay: float | None = None  # of a stream, and so the three below
    weight: float = 0.0  # of the samples so far, when the next ones count 1
    batches: int = 0
    updates: int = 0  # of any layer's state: whether a failed batch left traces
    marks: list[Mark] = field(default_factory=list)
    regions: Regions = field(default_factory=Regions)
    ranks: Ranks | None = None  # of a distributed fit, and so the next
    read: int = 0  # samples in this pass, before the present batch
    sweeps: Sweeps | None = None  # where layers are fitted in groups

    def through(
        self, data: Iterable[Any], report: Callable[[Progress], Any] | None, keeper: Keeper
    ) -> Curvature:
        """Pass over the data until no layer needs it any more."""
        if self.sweeps:
            self.marks = self.sweeps.marks
        modules = self.selection.every.values()
        with _undisturbed(modules), captured(self.selection) as record:
            done = keeper.restored(self, data)
            while not done:
                number = self.one_pass(data, record, report, keeper)
                done = self.done()
                keeper.after_pass(self, self.num_samples, number, done)
            return self.finished()

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
            if self.ranks and self.ranks.due:
                synchronise(self.ranks, self)
            if meter:
                meter.show(number, index, last=following is _END)
            if following is not _END:
                keeper.after_batch(self, index, number)
        while self.ranks and self.ranks.others_go_on(self._due()):
            if self.ranks.due:
                synchronise(self.ranks, self)
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

    def _due(self) -> bool:
        waiting = (self.states[name] for name in self.states.keys() - self.settled)
        return any(self.estimator.due(state) for state in waiting)

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
        state = self.estimator.init(name, samples)
        self.states[name] = self.estimator.shared(state) if self.ranks else state
        if self.num_probes:
            self.probes[name] = Probes(self.num_probes, self.seed, name, samples)
        return True

    def _meter(self, data: Iterable[Any], report: Callable[[Progress], Any], spent: float) -> Meter:
        changes = [self.estimator.change(state) for state in self.states.values()]
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
            record.clear()
            with advised("the forward pass", "use smaller batches"):
                device = next(self.model.parameters()).device
                outputs = self._outputs(inputs, device, number)
            record.closed = True
            if not finite(outputs.detach()):
                raise ValueError(record.first_not_finite() or "the model's outputs are not finite")
            count = outputs.shape[0]
            self._check_same(outputs, targets, number)
            self._look(outputs, record)
            regions, calls = list(record.regions), list(record.calls)

            def take(name: str, grads: Directions) -> None:
                self._take(name, record, grads, count, index, alone)

            with advised("the backward pass", "use smaller batches, or fewer layers by layers=..."):
                first = self.ranks.first_index(count, self._due()) if self.ranks else index
                # A sweep chooses its layers in the order of the model: all of them come first.
                early = take if self.states or not self.sweeps else None
                grads = self._gradients(outputs, moved(targets, device), record, first, early)
            # Regions first: they need the graph. All of it, as before torch 2.8 nodes of custom
            # functions end with the outputs, even where Python holds them.
            for name in regions:
                take(name, grads.pop(name))
            del outputs  # and with it the graph
            for name in list(grads):
                take(name, grads.pop(name))
            self._silent(self.settled.union(regions, calls), count)
        except ValueError as error:
            if type(error) is not ValueError:  # the user's own
                raise
            raise ValueError(f"batch {number}: {error}") from error
        return count

    def _look(self, outputs: Tensor, record: Record) -> None:
        """Find where derivatives are needed; layers found to have no treatment are left out."""
        graph = Graph(outputs)
        reasons = untreatable(outputs, graph, record, self.selection, self.shapes)
        for name, reason in reasons.items():
            if name in self.shapes:
                raise ValueError(f"layer {name!r}: {reason}")
            self.selection.drop(name, reason)
        for name in record.calls.keys() - self.selection.modules.keys():
            del record.calls[name]
        wanted = {k: v for k, v in self.selection.loose.items() if k not in self.settled}
        record.regions = self.regions.find(outputs, graph, wanted)
        for name in self.settled & record.calls.keys():
            del record.calls[name]  # no derivative is needed by what it put out
        record.find_passed(graph)

    def _take(
        self,
        name: str,
        record: Record,
        grads: Directions,
        count: int,
        index: int,
        alone: bool,
    ) -> None:
        if name in self.settled:
            return
        with advised(f"layer {name!r}", _LESS_MEMORY):
            try:
                samples = take_samples(name, record, grads, count)
            except Unsupported as reason:
                if name in self.shapes:
                    raise ValueError(f"layer {name!r}: {reason}") from None
                self.selection.skip(name, str(reason))
                return
            self._update(name, samples, index, alone)

    def _outputs(self, inputs: Any, device: torch.device, number: int) -> Tensor:
        # Whatever the forward pass draws is a function of seed and batch, on every pass.
        if self.ranks:  # which take turns, were it one process
            number = number * self.ranks.world + self.ranks.rank
        seed = (self.seed * 1_000_003 + number) % 2**63
        with seeded(seed, cuda=device.type == "cuda"), callers():
            outputs = (self.predict or called)(self.model, moved(inputs, device))
        return checked_outputs(outputs, inputs)

    def _gradients(
        self, outputs: Tensor, targets: Any, record: Record, index: int, take: Take | None
    ) -> dict[str, Directions]:
        values = outputs.detach()
        values = values.float() if values.element_size() < 4 else values
        cotangents = self.likelihood.cotangents(
            values, targets, self.fisher, self.mc_samples, self.seed, index
        )
        return output_gradients(outputs, (c.to(outputs) for c in cotangents), record, take)

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
                    share = self.weight / index
                    self.states[name] = self.estimator.decayed(self.states[name], share)
        if type(samples) is not type(self.shapes[name]):
            raise ValueError(
                f"layer {name!r}: it is called in another way than in the batches before (as "
                "self-attention and as cross-attention?)"
            )
        if self.num_probes and not self.passes:
            self.probes[name].add(samples)
        self.updates += 1
        self.states[name] = self.estimator.update(self.states[name], samples, alone=alone)

    def _footprint(self, samples: LayerSamples) -> Footprint:
        o, i = samples.shape
        probes = 2 * self.num_probes * o * i * samples.grads.element_size()
        return self.estimator.footprint(samples) + Footprint(probes, 0)

    def _silent(self, reached: set[str], count: int) -> None:
        """Layers that this batch did not reach have zero gradients for its samples."""
        for name in self.states.keys() - reached:
            self._update(name, self.shapes[name].silent(count), 0, False)

    def stream(self, batch: Any) -> None:
        """Take in one more batch."""
        modules = list(self.model.modules())  # there may be new ones
        with _undisturbed(modules), captured(self.selection) as record:
            count = self._batch(batch, record, self.num_samples, self.batches, False)
            self.num_samples, self.batches = self.num_samples + count, self.batches + 1
            self.weight += count
            # Now and not before the next batch, which may turn out to be no good.
            if self.decay is not None and self.decay != 1:
                self.weight *= self.decay
                for name, state in self.states.items():
                    self.states[name] = self.estimator.decayed(state, self.decay)

    def snapshot(self) -> Curvature:
        """The curvature of the stream so far; the states stay as they are."""
        blocks = {}
        skipped = dict(self.selection.skipped)
        for name in self.selection.blocks:
            if name in self.states:
                # A copy of one layer at a time: what finishes a state may change it.
                blocks[name] = self.estimator.finish(copy.deepcopy(self.states[name]), self.weight)
            else:
                skipped[name] = "its forward was never called"
        layouts = {name: self.selection.layout(name) for name in blocks}
        origin = repr(self.estimator), self.fisher, self.seed, parameter_counts(self.model)
        count = max(1, round(self.weight / (self.decay or 1)))
        return Curvature(blocks, count, layouts, skipped, *origin)

    def done(self) -> bool:
        """Hand every layer to its next pass; True where none needs one."""
        for name in self.states.keys() - self.settled:
            with advised(f"layer {name!r}", _LESS_MEMORY):
                self.states[name], settled = self.estimator.next_pass(self.states[name])
            if settled:
                self.settled.add(name)
        return self.states.keys() <= self.settled or self.passes >= self.estimator.pass_limit

    def finished(self) -> Curvature:
        for name in [name for name in self.selection.blocks if name not in self.shapes]:
            loose = name in self.selection.loose
            reason = "no output depends on it" if loose else "its forward was never called"
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
        with advised(f"layer {name!r}", _LESS_MEMORY):
            block = self.estimator.finish(self.states.pop(name), self.num_samples)
        _check_range(name, block)
        return (
            self.probes.pop(name).certified(block, self.num_samples) if self.num_probes else block
        )


def _in_range(block: Block) -> bool:
    """Whether all numbers are finite: those of a semi-definite factor are bounded by its diagonal,
    and to look at all of them would take as long as a small fit."""
    if isinstance(block, GroupedBlock):
        return all(map(_in_range, block.blocks))
    if not isinstance(block, KroneckerBlock):
        return all(map(finite, block.tensors()))
    for factor in (block.left, block.right):
        whole = factor.ndim == 2
        if whole and math.isfinite(factor.trace().item()):
            continue
        if not finite(factor.diagonal() if whole else factor):
            return False
    return True


def _check_range(name: str, block: Block) -> None:
    """Inputs and gradients were finite, so what is not is a block beyond the range of its dtype."""
    if not _in_range(block):
        raise ValueError(
            f"layer {name!r}: its block has numbers beyond the range of {block.dtype}: bring its "
            "inputs or the outputs to a smaller scale, or fit the model in float64 (model.double())"
        )


_END = object()
_LESS_MEMORY = (
    "use smaller batches, a smaller memory_limit or buffer of kfoc.KFOC, or leave the layer out by "
    "layers=..."
)
