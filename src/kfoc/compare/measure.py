"""Fits every estimator to one model and its data, and keeps the numbers of the comparison."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, RandomSampler

from kfoc import KFAC, KFOC, Block, Curvature, Diagonal, EigenCorrected, Estimator, fit
from kfoc.compare.convergence import Curve, half_steps, sample_counts
from kfoc.compare.factory import CompareError, Subject
from kfoc.compare.pictures import Heatmap, heatmaps, spectrum
from kfoc.compare.timed import timed

Say = Callable[[str], None]

# Fits are timed so often at most, and again only while they took less than so many seconds in all.
REPEATS, REPEAT_SECONDS = 5, 3.0


@dataclass(frozen=True)
class Kind:
    """One estimator of the comparison."""

    label: str
    estimator: Estimator
    meaning: str


ESTIMATORS = {
    "diagonal": Kind("diagonal", Diagonal(), "the exact diagonal"),
    "kfac": Kind("K-FAC", KFAC(), "one Kronecker product, by independence assumptions"),
    "kfoc": Kind("K-FOC", KFOC(), "the closest Kronecker product, in one pass"),
    "ekfac": Kind("EKFAC", EigenCorrected(KFAC()), "the best diagonal in K-FAC’s eigenbasis"),
    "ekfoc": Kind("EK-FOC", EigenCorrected(KFOC()), "the best diagonal in K-FOC’s eigenbasis"),
    "optimum": Kind(
        "optimum",
        KFOC(aggregation="exact"),
        "the closest Kronecker product, iterated over as many passes as it takes",
    ),
}
DEFAULT = ("diagonal", "kfac", "kfoc", "ekfoc")
# These have curves by the number of samples: they take one pass, and their blocks' distance is
# cheap and exact.
BY_SAMPLES = ("diagonal", "kfac", "kfoc")


@dataclass(frozen=True)
class Entry:
    """One estimator at one layer.

    Attributes:
        error, standard_error: `||F - block|| / ||F||` and its standard error, with the F of the
            draws that all estimators saw.
        fisher_error, fisher_error_std: the same with the Fisher itself, from other draws; where
            nothing is drawn it is the same number.
        seconds: what the estimator spent on the layer in a fit, forward and backward pass apart.
        numbers, bytes: what the block keeps.
        plan, steps, converged: of the contraction, as in `kfoc.Report`.
        structure: the kind of block.
        heatmaps, spectrum: pictures of the block, where they can be had.
    """

    error: float
    standard_error: float
    fisher_error: float
    fisher_error_std: float
    seconds: float
    numbers: int
    bytes: int
    plan: str
    steps: int
    converged: bool
    structure: str
    heatmaps: tuple[Heatmap, ...] = ()
    spectrum: Curve | None = None


@dataclass(frozen=True)
class Layer:
    """One layer: (outputs, inputs with bias), its entries by estimator, and its curves."""

    name: str
    shape: tuple[int, int]
    entries: dict[str, Entry]
    by_step: Curve | None = None
    by_samples: dict[str, Curve] = field(default_factory=dict)


@dataclass(frozen=True)
class Study:
    """All that the tables and the report are made of.

    Attributes:
        title: what was compared on, as the user named it.
        settings: name -> value, to print.
        seconds: estimator -> wall time of its fit, without probes, model included.
        skipped: layer -> why it has no block.
        num_samples, first_batch: samples in all, and in the batch of the curves by half step.
    """

    title: str
    settings: dict[str, str]
    labels: dict[str, str]
    seconds: dict[str, float]
    layers: tuple[Layer, ...]
    skipped: dict[str, str]
    num_samples: int
    first_batch: int

    def closest(self, layer: Layer) -> str:
        """The estimator of the smallest error against the F of the draws that all saw."""
        return min(layer.entries, key=lambda name: layer.entries[name].error)

    @property
    def drawn(self) -> bool:
        """Whether labels were drawn, so that there are two errors to show."""
        entries = [entry for layer in self.layers for entry in layer.entries.values()]
        return any(entry.fisher_error != entry.error for entry in entries)

    def numbers(self, estimator: str) -> int:
        """What the estimator's blocks keep, over all layers."""
        return sum(layer.entries[estimator].numbers for layer in self.layers)

    def to_json(self) -> dict[str, Any]:
        """The numbers without the pictures."""
        content = asdict(self)
        for layer in content["layers"]:
            for entry in layer["entries"].values():
                del entry["heatmaps"], entry["spectrum"]
                for key, value in entry.items():
                    if isinstance(value, float) and math.isnan(value):  # which JSON does not have
                        entry[key] = None
        return content


@dataclass(frozen=True)
class Options:
    """What is asked for, beside the subject.

    Attributes:
        estimators: keys of `ESTIMATORS`.
        batches: take the first so many batches; None: all.
        curves: whether to fit for curves of convergence too.
        pictures: whether to draw heat maps and spectra.
    """

    estimators: tuple[str, ...] = DEFAULT
    probes: int = 16
    batches: int | None = None
    curves: bool = True
    pictures: bool = True


def measure(
    subject: Subject, options: Options, title: str = "", say: Say = lambda text: None
) -> Study:
    """Fit every estimator with probes for the errors, and without for the time.

    The first fits, of the first batch alone, warm up what is set up once a process.

    Raises:
        CompareError: unknown estimators, no data, or data in another order on each pass.
        ValueError: of `kfoc.fit`.
    """
    unknown = [name for name in options.estimators if name not in ESTIMATORS]
    if unknown or not options.estimators:
        raise CompareError(
            f"estimators must be some of {', '.join(ESTIMATORS)}, found "
            f"{', '.join(unknown) or 'none'}"
        )
    data = repeatable(subject.data, options.batches)
    first = next(iter(data), None)
    if first is None:
        raise CompareError("the data has no batch")
    model, arguments = subject.model, subject.arguments
    kinds = {name: ESTIMATORS[name] for name in options.estimators}

    def fitted(name: str, batches: Iterable[Any], **more: Any) -> Curvature:
        return fit(model, batches, estimator=kinds[name].estimator, **arguments, **more)

    say("the first batch")
    for name in kinds:
        fitted(name, [first])
    by_step, first_batch = half_steps(model, first, arguments) if options.curves else ({}, 0)
    say("times")
    seconds, by_layer = _times(model, data, kinds, arguments)
    fits: dict[str, Curvature] = {}
    by_samples: dict[str, dict[str, Curve]] = {}
    for name, kind in kinds.items():
        say(f"{kind.label}: errors")
        fits[name] = fitted(name, data, probes=options.probes)
        if options.curves and name in BY_SAMPLES:
            say(f"{kind.label}: by samples")
            by_samples[name] = sample_counts(partial(fitted, name), data, fits[name])
    some = next(iter(fits.values()))
    layers = tuple(
        Layer(
            layer,
            some[layer].shape,
            {key: _entry(fits[key][layer], by_layer[key][layer], options) for key in fits},
            by_step.get(layer),
            {key: curves[layer] for key, curves in by_samples.items() if layer in curves},
        )
        for layer in some
        # A layer that one of the estimators refuses could not be compared.
        if all(layer in curvature for curvature in fits.values())
    )
    return Study(
        title,
        _settings(model, some.num_samples, arguments, options),
        {name: kind.label for name, kind in kinds.items()},
        seconds,
        layers,
        {layer: reason for c in fits.values() for layer, reason in c.skipped.items()},
        some.num_samples,
        first_batch,
    )


def repeatable(data: Iterable[Any], batches: int | None) -> Iterable[Any]:
    """The data, the same on every pass: all estimators must see one and the same F.

    What is limited, or can be read only once, is kept in memory.

    Raises:
        CompareError: a loader that shuffles.
    """
    if batches is not None:
        return list(islice(iter(data), batches))
    if isinstance(data, Iterator):
        return list(data)
    if isinstance(data, DataLoader) and isinstance(data.sampler, RandomSampler):
        raise CompareError(
            "the DataLoader shuffles, so every estimator would see its samples in another order: "
            "use shuffle=False, or --batches N, which keeps the first N batches in memory"
        )
    return data


Seconds = dict[str, float]


def _times(
    model: nn.Module, data: Iterable[Any], names: Iterable[str], arguments: dict[str, Any]
) -> tuple[Seconds, dict[str, Seconds]]:
    """Seconds of a fit without probes: the fastest of some short ones, or of one long one.

    The estimators take turns, so that what else the machine does in between meets all of them.

    Returns:
        By estimator, of whole fits; and by estimator and layer, of what was spent on that.
    """
    cuda = any(parameter.is_cuda for parameter in model.parameters())
    found: dict[str, list[float]] = {name: [] for name in names}
    by_layer: dict[str, Seconds] = {name: {} for name in found}
    for _ in range(REPEATS):
        for name, before in found.items():
            if before and sum(before) >= REPEAT_SECONDS:
                continue
            spent: Seconds = {}
            estimator = timed(ESTIMATORS[name].estimator, spent, cuda)
            start = time.perf_counter()
            fit(model, data, estimator=estimator, **arguments)
            if cuda:
                torch.cuda.synchronize()
            before.append(time.perf_counter() - start)
            for layer, seconds in spent.items():
                by_layer[name][layer] = min(seconds, by_layer[name].get(layer, seconds))
    return {name: min(times) for name, times in found.items()}, by_layer


def _entry(block: Block, seconds: float, options: Options) -> Entry:
    report, tensors = block.report, list(block.tensors())
    found = report.relative_error, report.standard_error, report.fisher_error
    error, deviation, itself, its_deviation = (
        math.nan if e is None else e for e in (*found, report.fisher_error_std)
    )
    return Entry(
        error,
        deviation,
        itself,
        its_deviation,
        seconds,
        sum(map(Tensor.numel, tensors)),
        sum(t.numel() * t.element_size() for t in tensors),
        report.plan,
        report.steps,
        report.converged,
        type(block).__name__.removesuffix("Block"),
        heatmaps(block) if options.pictures else (),
        spectrum(block) if options.pictures else None,
    )


def _settings(
    model: nn.Module, samples: int, arguments: dict[str, Any], options: Options
) -> dict[str, str]:
    parameters = list(model.parameters())
    fisher = str(arguments.get("fisher", "mc"))
    if fisher in ("mc", "mc-plain"):
        draws = arguments.get("mc_samples", 1)
        kind = "weighted" if fisher == "mc" else "plain"
        fisher = f"Monte Carlo, {draws} {kind} draw{'s' if draws != 1 else ''} a sample"
    likelihood = arguments.get("likelihood", "categorical")
    device = parameters[0].device if parameters else torch.device("cpu")
    threads = torch.get_num_threads()
    return {
        "model": type(model).__name__,
        "parameters": f"{sum(p.numel() for p in parameters):,}",
        "samples": f"{samples:,}",
        "likelihood": likelihood if isinstance(likelihood, str) else repr(likelihood),
        "Fisher": fisher,
        "probes": str(options.probes),
        "seed": str(arguments.get("seed", 0)),
        "device": torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"{device.type}, {threads} thread{'s' if threads > 1 else ''}",
    }
