"""The paper's experiment: every method, batch size and seed against the exact block."""

from __future__ import annotations

import importlib.metadata
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypedDict

import torch
from torch import Tensor, nn

import kfoc
from kfoc.reproduce.data import DataError, Dataset
from kfoc.reproduce.measure import ExactBlock
from kfoc.reproduce.networks import HIDDEN, LeNet5, Regression, half_mean_squared_error, train

BatchSize = int | Literal["all"]

# Nearer than by default: what is shown is how far methods are from the optimum.
RTOL = 1e-6

ESTIMATORS: dict[str, Callable[[], Any]] = {
    "diagonal": kfoc.Diagonal,
    "kfac": kfoc.KFAC,
    "kfoc_approx": lambda: kfoc.KFOC("approx", rtol=RTOL),
    "kfoc_running": lambda: kfoc.KFOC("running", rtol=RTOL),
    "kfoc_online": lambda: kfoc.KFOC("online", rtol=RTOL),
    "kfoc_exact": lambda: kfoc.KFOC("exact", rtol=RTOL),
}
# Beside the paper's: K-FOC of two kinds of draws, and the optimum, against the exact Fisher.
DRAWS = {"plain": "mc-plain", "weighted": "mc"}
AGAINST_EXACT = (*DRAWS, "expected")
# A layer of more parameters has an exact block (float64) of more than 800 MB.
LARGEST_BLOCK = 10_000


class Record(TypedDict):
    """One line of results.json: `seconds` are those of the fit, of all layers together."""

    dataset: str
    layer: str
    method: str
    batch_size: BatchSize
    seed: int
    relative_error: float
    seconds: float


class Unit(NamedTuple):
    """What is run, timed and saved at once."""

    dataset: str
    seed: int
    method: str
    batch_size: BatchSize


@dataclass(frozen=True)
class Experiment:
    """One network on one data set.

    layers: module name -> name in the results. comparable: the paper ran it on this data.
    data: what the network is trained on. samples: what the curvature is of.
    """

    name: str
    data: Dataset
    samples: Dataset
    layers: dict[str, str]
    likelihood: str
    build: Callable[[], nn.Module]
    loss: Callable[[Tensor, Tensor], Tensor]
    training: dict[str, float]
    batch_sizes: tuple[BatchSize, ...]
    comparable: bool

    def settings(self) -> dict[str, Any]:
        """All that the numbers depend on, besides the seed: results under others do not mix."""
        return {
            "data": self.data.source,
            "curvature of": self.samples.source,
            "fingerprint": self.samples.fingerprint(),
            "samples": len(self.samples),
            "batch sizes": list(self.batch_sizes),
            "comparable with the paper": self.comparable,
            "training": self.training,
            "likelihood": self.likelihood,
            "fisher": "mc-plain, 1 sample, float64",
            "torch": torch.__version__,
            "kfoc": importlib.metadata.version("kfoc"),
        }

    def units(self, seeds: int) -> list[Unit]:
        """Every unit, in the order in which they run."""
        fits = [(method, size) for method in ESTIMATORS for size in self.batch_sizes]
        fits += [(kind, self.batch_sizes[-1]) for kind in AGAINST_EXACT]
        return [
            Unit(self.name, seed, method, size)
            for seed in range(seeds)
            for method, size in [("optimum", "all"), *fits]
        ]


def fully_connected(data: Dataset, comparable: bool) -> Experiment:
    """d -> 50 -> 1 on a table, both layers."""
    columns = data.inputs.shape[1]
    most = LARGEST_BLOCK // HIDDEN - 1
    if columns > most:
        raise DataError(
            f"{data.source}: {columns} input columns, but the exact block of layer 1,"
            f" which everything is measured against, is only affordable up to {most}"
        )
    return Experiment(
        name="fully_connected",
        data=data,
        samples=data,
        layers={"hidden": "layer 1", "output": "layer 2"},
        likelihood="gaussian",
        build=lambda: Regression(columns),
        loss=half_mean_squared_error,
        # The paper does not say how long it trains. The longer, the further all errors rise.
        training={"epochs": 20, "batch_size": 32, "learning_rate": 1e-3},
        batch_sizes=(*(size for size in (1, 10, 100) if size < len(data)), "all"),
        comparable=comparable,
    )


def convolutional(data: Dataset, digits: int | None = None) -> Experiment:
    """LeNet-5 trained on all of `data`, its two convolutions on `digits` of them (None: all)."""
    samples = data if digits is None else data.subset(digits)
    sizes: tuple[BatchSize, ...] = tuple(s for s in (1, 10, 100, 1000) if s <= len(samples))
    sizes = sizes if 1000 in sizes else (*sizes, "all")
    return Experiment(
        name="convolutional",
        data=data,
        samples=samples,
        layers={"conv1": "layer 1", "conv2": "layer 2"},
        likelihood="categorical",
        build=LeNet5,
        loss=nn.functional.cross_entropy,
        training={"epochs": 15, "batch_size": 64, "learning_rate": 1e-3},
        batch_sizes=sizes,
        comparable=True,
    )


# --- One seed -----------------------------------------------------------------------------------


def run_seed(
    experiment: Experiment,
    seed: int,
    pending: Iterable[Unit],
    say: Callable[[str], object] = lambda text: None,
) -> Iterator[list[Record]]:
    """Train this seed's network, form its exact blocks, then yield the records of each unit."""
    say(f"seed {seed}: training the network")
    training: dict[str, Any] = experiment.training
    network = train(experiment.build, experiment.loss, experiment.data, seed, **training).double()
    exact: dict[str, tuple[dict[str, ExactBlock], float]] = {}

    def exact_blocks(fisher: str) -> None:
        say(f"seed {seed}: the exact blocks")
        estimator = kfoc.BlockDiagonal(max_size=LARGEST_BLOCK)
        found, seconds = timed_fit(experiment, network, estimator, seed, 1000, fisher)
        blocks = {
            layer: ExactBlock.from_dense(found[module].to_dense(), *found[module].shape)
            for module, layer in experiment.layers.items()
        }
        exact[fisher] = blocks, seconds

    exact_blocks("mc-plain")
    for unit in pending:
        fisher = "exact" if unit.method in AGAINST_EXACT else "mc-plain"
        if fisher not in exact:
            exact_blocks(fisher)
        say(f"seed {seed}: {unit.method}, batch size {unit.batch_size}")
        blocks, seconds = exact[fisher]
        if unit.method in ("optimum", "expected"):
            start = time.perf_counter()
            errors = {layer: block.optimal_error() for layer, block in blocks.items()}
            seconds += time.perf_counter() - start
        else:
            errors, seconds = _fit_and_measure(experiment, network, blocks, unit)
        yield [
            Record(layer=layer, relative_error=error, seconds=seconds, **unit._asdict())  # type: ignore[typeddict-item]
            for layer, error in errors.items()
        ]


def _fit_and_measure(
    experiment: Experiment, network: nn.Module, exact: dict[str, ExactBlock], unit: Unit
) -> tuple[dict[str, float], float]:
    estimator = ESTIMATORS.get(unit.method, ESTIMATORS["kfoc_online"])()
    fisher = DRAWS.get(unit.method, "mc-plain")
    found, seconds = timed_fit(experiment, network, estimator, unit.seed, unit.batch_size, fisher)
    errors = {}
    for module, layer in experiment.layers.items():
        block = found[module]
        errors[layer] = (
            exact[layer].diagonal_error(block.diagonal)
            if unit.method == "diagonal"
            else exact[layer].kronecker_error(block.left, block.right)
        )
    return errors, seconds


def timed_fit(
    experiment: Experiment,
    network: nn.Module,
    estimator: Any,
    seed: int,
    batch_size: BatchSize,
    fisher: str,
) -> tuple[Any, float]:
    """The curvature of the samples, and the seconds of this one fit, no other method's hooks live.

    The labels are drawn by (seed, sample), so every method and batch size sees the same ones.
    """
    samples = experiment.samples
    size = len(samples) if batch_size == "all" else batch_size
    targets = samples.targets.double() if samples.targets.is_floating_point() else samples.targets
    batches = list(zip(samples.inputs.double().split(size), targets.split(size), strict=True))
    options: dict[str, Any] = {"likelihood": experiment.likelihood, "fisher": fisher, "seed": seed}
    layers = tuple(experiment.layers)
    start = time.perf_counter()
    curvature = kfoc.fit(network, batches, estimator=estimator, layers=layers, **options)
    return curvature, time.perf_counter() - start
