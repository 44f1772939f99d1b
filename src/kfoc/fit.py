"""The one loop over data: batches through the model, layers to the estimator."""

from __future__ import annotations

import copy
import math
import os
import warnings
from collections.abc import Callable, Collection, Container, Iterable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from kfoc.agreement import check_same, pool, sharded, unwrapped
from kfoc.ambient import as_called, callers, plainly
from kfoc.arguments import check_model, whole
from kfoc.batches import (
    Mark,
    Predict,
    called,
    check_next_token,
    checked_outputs,
    moved,
    present,
    unpacked,
)
from kfoc.blocks import Block, GroupedBlock, KroneckerBlock
from kfoc.buffers import buffers_kept
from kfoc.capture import (
    Tagged,
    captured,
    checked_finite,
    output_gradients,
    tagged_gradients,
    take_samples,
)
from kfoc.certificate import Probes
from kfoc.checkpoint import Checkpoint, Keeper
from kfoc.checks import UNCALLED, untreatable
from kfoc.coverage import parameter_counts
from kfoc.curvature import Curvature
from kfoc.distributed import Ranks
from kfoc.estimators import KFOC, Estimator
from kfoc.forward import first_samples
from kfoc.graph import Graph
from kfoc.layers import Unsupported, own_parameters
from kfoc.likelihoods import Likelihood, check_fisher, resolved
from kfoc.memory import Footprint, advised, within
from kfoc.offload import Sweeps
from kfoc.ownership import Directions, InOrder, Rule
from kfoc.progress import Meter, Progress, length, reporter
from kfoc.proof import (
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
from kfoc.record import Call, Record
from kfoc.samples import Direct, LayerSamples, finite, magnitude
from kfoc.scales import beyond, check_representable, squared
from kfoc.selection import Selection, select
from kfoc.threads import UNCOMPILED, random_state_kept, seeded
from kfoc.uncovered import UNSUMMED, Batch, Uncovered, check_size
from kfoc.vectors import naming


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
    verify: bool = True,
) -> Curvature:
    """Estimate the Fisher information of a model, one block per layer, from a pass over data.

    The model runs in the mode it is in (call `model.eval()` first, as a rule) and comes back as it
    was; so does the global random state. Dropout in train mode draws masks that depend on `seed`
    and the batch's number alone.

    Every layer's samples are checked on the first few samples, in a forward pass of their own and
    two backward passes: that each row belongs to one sample, and that they add up to autograd's
    gradient (docs/proof.md). Layers whose rows are not the samples in order (windows, sequences
    first, experts) are gathered by sample.

    Parameters that no layer's treatment covers (class tokens, scales, recurrent layers, layers
    whose rows mix samples or that are used in other ways) get a block by module, from per-sample
    gradients by `torch.func`: exact, up to 65,536 parameters in all, and a dense or diagonal block.
    That costs a forward and backward pass of single samples, or up to one backward pass per sample
    and direction. What has no block is in `Curvature.skipped`.

    Args:
        model: any module whose outputs have the samples first, each dependent on its own inputs.
        data: batches `(inputs, targets)`, or mappings (dict, transformers' BatchEncoding),
            dataclasses or NamedTuples with their targets under "labels", which the model does not
            get: the loss is formed here. Inputs are a tensor, a tuple or list that the model is
            called with in order, a mapping, dataclass or NamedTuple that it is called with by
            name, or whatever `predict` takes; tensors in them are moved to the model's device.
            Targets may be missing or None but for `fisher="empirical"`. Labels are compared
            with the outputs as they stand: for a model of the next token, drop the last outputs
            in `predict` and the first labels in `data`. Batches without samples are passed over,
            and do not count.
        likelihood: "categorical" (logits), "gaussian" (unit variance), "bernoulli" (logits), or a
            `Likelihood`.
        estimator: KFOC() by default; KFAC(), Diagonal(), BlockDiagonal().
        fisher: "mc" (labels drawn by what they contribute, and weighted for it), "mc-plain" (drawn
            from the model; noisier), "exact" (expectation over the model's labels) or "empirical"
            (the observed labels).
        mc_samples: draws per sample, for "mc" and "mc-plain".
        layers: names or patterns (`fnmatch`) of the layers to treat; None: all that can be. One
            that is named and cannot be treated is an error.
        predict: `(model, inputs) -> outputs`, a tensor or an object with `.logits`. None: the
            model is called with the inputs; it must return one or the other.
        probes: how many Gaussian probes certify each block; 16 is plenty. They give
            `relative_error`, against the F of the very labels that were drawn, and `fisher_error`,
            against the Fisher itself, each with its standard error. The second takes two more
            draws of every label in the first pass, which no block sees: two more backward
            passes, `4 * probes` weights' memory per layer instead of 2, and three times the
            probes' time (a K-FAC fit of LeNet-5 with 16 probes took 0.9 s for 0.5 s, one of
            256-wide linear layers, where probes are nearly all, 1.6 s for 0.6 s). Without drawn
            labels the two errors are the same number, at no such cost.
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
        verify: False leaves out the check of docs/proof.md, that every layer's samples are what
            the model's gradients are made of: for models that have passed it, and whose rows are
            the samples in order.

    Returns:
        The blocks by layer name, of the mean Fisher over the samples. A RuntimeWarning names the
        layers whose iteration ended at its limit of passes or steps.

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
        how = progress, saving, ranks, sweeps, verify
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
    verify: bool,
) -> Curvature:
    fisher, mc_samples, predict, probes, seed = options
    estimator = KFOC() if estimator is None else estimator
    _check_options(model, estimator, fisher, predict)
    mc_samples, probes, seed = _counts(mc_samples, probes, seed)
    options = fisher, mc_samples, predict, probes, seed
    report = reporter(progress)
    chosen = resolved(likelihood)

    def begin() -> _Run:
        selection = select(model, layers, estimator.largest_factor)
        more: dict[str, Any] = {"ranks": ranks, "sweeps": sweeps, "verify": verify}
        return _Run(model, chosen, estimator, *options, selection, **more)

    run = begin()
    check_independent(run.selection.every.items())
    if estimator.pass_limit > 1 and isinstance(data, Iterator):
        raise ValueError(
            f"{estimator} needs several passes over the data, and an iterator can be read once: "
            "pass a list or a DataLoader"
        )
    keeper = Keeper(*saving, run)
    if ranks:
        # A forward pass of a sharded model is a matter of all ranks.
        together = {"batches in data": str(length(data))} if sharded(model) else {}
        check_same(ranks, run, together)
    if not (ranks and sharded(model)):  # whose ranks run every batch together
        data = present(data)
    unsettled = run.unsettled
    with sweeps or keeper.open():
        while True:
            curvature = run.through(data, report, keeper)
            if sweeps is None or sweeps.over(run.passes, run.marks):
                break
            run = begin()  # each sweep meets the layers anew, and comes to the same decisions
            run.unsettled = unsettled
    if unsettled and not (ranks and ranks.rank):
        _warn_unsettled(estimator, unsettled)
    return curvature


def _warn_unsettled(estimator: Estimator, unsettled: dict[str, float | None]) -> None:
    """Tell the caller of `fit` which layers' iterations ended before they had converged."""
    worst = sorted(unsettled, key=lambda name: -(unsettled[name] or 0.0))
    shown = []
    for name in worst[:5]:
        change = unsettled[name]
        known = "" if change is None else f" (its last pass still changed sigma by {change:.1e})"
        shown.append(f"{name!r}{known}")
    more = f" and {len(worst) - 5} more" if len(worst) > 5 else ""
    warnings.warn(
        f"{estimator} did not converge in {len(worst)} layers: {', '.join(shown)}{more}. Their "
        "blocks are not yet the closest ones (report.converged is False): allow more passes, or "
        "more max_steps where batches are solved, or a larger rtol",
        RuntimeWarning,
        stacklevel=5,  # of `plainly` too
    )


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
    _check_options(model, estimator, fisher, predict)
    mc_samples, _, seed = _counts(mc_samples, 0, seed)
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
    model: nn.Module, estimator: Estimator, fisher: str, predict: Predict | None
) -> None:
    check_model(model)
    if not isinstance(estimator, Estimator):
        raise ValueError(f"estimator must be an instance such as kfoc.KFOC(), found {estimator!r}")
    estimator.check()
    check_fisher(fisher)
    if predict is not None and not callable(predict):
        raise ValueError(
            f"predict must be a function (model, inputs) -> outputs, found {predict!r}"
        )


def _counts(mc_samples: int, probes: int, seed: int) -> tuple[int, int, int]:
    seed = whole("seed", seed, -(2**63))
    if seed >= 2**63:
        raise ValueError(f"seed must fit 64 bits, found {seed}")
    return whole("mc_samples", mc_samples, 1), whole("probes", probes, 0), seed


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
    gpus = set()
    if torch.cuda.is_initialized():  # or no parameter can be there
        held = [p for module in modules for p in own_parameters(module).values()]
        gpus = {p.device.index or 0 for p in held if p.device.type == "cuda"}
    with (
        random_state_kept(sorted(gpus)),
        torch.enable_grad(),
        UNCOMPILED,
        buffers_kept(modules),
    ):
        yield


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
        with _undisturbed(modules), captured(self.selection) as record:
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
        self.states[name] = self.sized.init(name, samples)
        if self.num_probes:
            self.probes[name] = Probes(self.num_probes, self.seed, name, samples, self._drawn)
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
        """Check the layers' samples on a forward pass of their own, see `kfoc.proof`.

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
        self._note_scale(name, samples)
        self.states[name] = self.estimator.update(self.states[name], samples, alone=alone)

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
                with naming(name):
                    block = self.estimator.finish(copy.deepcopy(self.states[name]), self.weight)
                _check_range(name, block, self.scales.get(name, (0.0, 0.0)))
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
                self.states[name], settled = self.estimator.next_pass(self.states[name])
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
            change = self.estimator.change(state)
            block = self.estimator.finish(state, self.num_samples)
        if not block.report.converged:
            self.unsettled[name] = change
        _check_range(name, block, self.scales.get(name, (0.0, 0.0)))
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


def _largest(block: Block) -> list[float]:
    """The largest numbers of a block's parts, of which it is the product; not finite where one is
    not. Those of a semi-definite factor are bounded by its diagonal, and to look at all of them
    would take as long as a small fit."""
    if isinstance(block, GroupedBlock):
        each = zip(*map(_largest, block.blocks), strict=True)
        return [sum(part) if not math.isfinite(sum(part)) else max(part) for part in each]
    if isinstance(block, KroneckerBlock):
        factors = block.left, block.right
        return [magnitude(f.diagonal() if f.ndim == 2 else f) for f in factors]
    return [magnitude(tensor) for tensor in block.tensors()]


def _check_range(name: str, block: Block, scales: tuple[float, float]) -> None:
    """Inputs and gradients were finite, so what is not is a block beyond the range of its dtype.

    Args:
        scales: the largest input and output gradient. Where they, or their products, have squares
            that vanish, a part of zeros is no F of zero.
    """
    inputs, grads = scales
    products = inputs * inputs, grads * grads, inputs * grads, (inputs * grads) ** 2
    vanish = all(scales) and min(products) < torch.finfo(block.dtype).tiny
    with naming(name):
        for largest in _largest(block):
            if not math.isfinite(largest):
                raise ValueError(beyond("its block", block.dtype, ""))
            check_representable(largest or (min(products) if vanish else 0.0), block.dtype)


_END = object()
# What makes seeds of their own, far from the user's, for the two draws that no block sees.
_UNSEEN = 0x2545F4914F6CDD1D, 0x369DEA0F31A53F85
_LESS_MEMORY = (
    "use smaller batches, a smaller memory_limit or buffer of kfoc.KFOC, or leave the layer out by "
    "layers=..."
)
