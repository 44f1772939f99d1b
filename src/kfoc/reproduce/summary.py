"""Statistics over seeds, the paper's values beside them, and which claims they bear out."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib import resources
from typing import Any, NamedTuple

from kfoc.reproduce.experiment import AGAINST_EXACT, ESTIMATORS, BatchSize, Record

NAMES = {
    "diagonal": "Diagonal",
    "kfac": "K-FAC",
    "kfoc_approx": "K-FOC approx",
    "kfoc_running": "K-FOC running",
    "kfoc_online": "K-FOC online",
    "kfoc_exact": "K-FOC exact",
    "optimum": "optimum",
}
# Two methods whose results agree to this much are at the same optimum: rounding orders nothing.
TIE = 1e-4


class Stat(NamedTuple):
    """Over seeds."""

    mean: float
    low: float
    high: float

    @staticmethod
    def over(values: Iterable[float]) -> Stat:
        values = list(values)
        return Stat(sum(values) / len(values), min(values), max(values))

    def __str__(self) -> str:
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"


class Key(NamedTuple):
    layer: str
    method: str
    batch_size: BatchSize


@dataclass(frozen=True)
class Summary:
    """One experiment's results over its seeds.

    errors: relative errors. paper: the paper's, empty where it did not run on this data.
    by_seed: {key: {seed: relative error}}.
    """

    name: str
    settings: dict[str, Any]
    by_seed: dict[Key, dict[int, float]]
    errors: dict[Key, Stat]
    paper: dict[Key, Stat]

    @property
    def layers(self) -> list[str]:
        return sorted({key.layer for key in self.errors})

    @property
    def batch_sizes(self) -> list[BatchSize]:
        return self.settings["batch sizes"]

    @property
    def num_seeds(self) -> int:
        return len({seed for values in self.by_seed.values() for seed in values})

    def optimum(self, layer: str) -> Stat:
        return self.errors[Key(layer, "optimum", "all")]

    def of_draws(self, layer: str) -> str:
        """One line on what the draw of labels costs."""
        each = [self.errors[Key(layer, kind, self.batch_sizes[-1])] for kind in AGAINST_EXACT]
        plain, weighted, expected = each
        return (
            f"{layer.capitalize()}, against the exact Fisher: K-FOC of the plain draw "
            f"{plain}, of a weighted draw {weighted}; optimum {expected}"
        )


def summarise(records: list[Record], settings: dict[str, Any]) -> list[Summary]:
    """One summary for each experiment of which at least one seed is complete.

    Seeds that were broken off are left out: means over different seeds do not compare.
    """
    tables: dict[str, dict[int, dict[Key, float]]] = defaultdict(lambda: defaultdict(dict))
    for record in records:
        key = Key(record["layer"], record["method"], record["batch_size"])
        tables[record["dataset"]][record["seed"]][key] = record["relative_error"]
    summaries = []
    for name, by_seed in tables.items():
        wanted = _all_keys(by_seed, settings[name]["batch sizes"])
        complete = {s: values for s, values in sorted(by_seed.items()) if wanted <= values.keys()}
        if complete:
            summaries.append(_summary(name, settings[name], complete))
    return summaries


def _all_keys(by_seed: dict[int, dict[Key, float]], batch_sizes: list[BatchSize]) -> set[Key]:
    layers = {key.layer for values in by_seed.values() for key in values}
    fits = [(method, size) for method in ESTIMATORS for size in batch_sizes]
    fits += [("optimum", "all"), *((kind, batch_sizes[-1]) for kind in AGAINST_EXACT)]
    return {Key(layer, *fit) for layer in layers for fit in fits}


def _summary(name: str, settings: dict[str, Any], seeds: dict[int, dict[Key, float]]) -> Summary:
    keys = next(iter(seeds.values()))
    by_seed = {key: {seed: values[key] for seed, values in seeds.items()} for key in keys}
    return Summary(
        name=name,
        settings=settings,
        by_seed=by_seed,
        errors={key: Stat.over(values.values()) for key, values in by_seed.items()},
        paper=paper_values(name) if settings["comparable with the paper"] else {},
    )


def paper_values(name: str) -> dict[Key, Stat]:
    """What was read off the paper's figure; its diagonal, one value, is at every batch size."""
    text = resources.files("kfoc.reproduce").joinpath("paper_values.json").read_text("utf-8")
    values = {}
    for layer, curves in json.loads(text)[name].items():
        for method, curve in curves.items():
            if not isinstance(curve, dict):
                curve = {size: [curve, curve, curve] for size in curves["kfac"]}
            for size, stat in curve.items():
                values[Key(layer, method, size if size == "all" else int(size))] = Stat(*stat)
    return values


# --- Claims -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Claim:
    """A statement on the results and what speaks against it; none of that: it holds."""

    text: str
    exceptions: list[str]

    @property
    def holds(self) -> bool:
        return not self.exceptions


def claims(summary: Summary) -> list[Claim]:
    """The paper's claims, and those on this library's own aggregations."""
    found = [
        _not_above(summary, "kfoc_running", "kfac"),
        _not_above(summary, "kfoc_running", "kfoc_approx"),
        _near_optimum(summary, "kfoc_online", 0.01),
        _near_optimum(summary, "kfoc_exact", 0.001),
    ]
    if summary.name == "fully_connected":
        found.append(_running_is_exact_on_layer_2(summary))
    if summary.name == "fully_connected" and summary.paper:
        found.append(_near_paper(summary, 0.1))
    return found


def _cells(summary: Summary, method: str) -> Iterator[tuple[Key, str]]:
    for layer in summary.layers:
        for size in summary.batch_sizes:
            yield Key(layer, method, size), f"{layer}, batch size {size}"


def _not_above(summary: Summary, method: str, other: str) -> Claim:
    exceptions = []
    for key, place in _cells(summary, method):
        here, there = summary.errors[key].mean, summary.errors[key._replace(method=other)].mean
        if here > there + TIE:
            exceptions.append(f"{place}: {here:.4f} against {there:.4f}")
    text = (
        f"{NAMES[method]} at or below {NAMES[other]} on every layer, at every batch size"
        f" (means; ties within {TIE})"
    )
    return Claim(text, exceptions)


def _near_optimum(summary: Summary, method: str, margin: float) -> Claim:
    exceptions = []
    for key, place in _cells(summary, method):
        optimum = summary.by_seed[Key(key.layer, "optimum", "all")]
        gap = max(error - optimum[seed] for seed, error in summary.by_seed[key].items())
        if gap > margin:
            exceptions.append(f"{place}: {gap:.4f} above it")
    text = (
        f"{NAMES[method]} within {margin} of the whole set's optimum on every layer, at every"
        " batch size, for every seed"
    )
    return Claim(text, exceptions)


def _running_is_exact_on_layer_2(summary: Summary) -> Claim:
    exceptions = [
        f"batch size {key.batch_size}: {summary.errors[key].mean:.4f}"
        for key, _ in _cells(summary, "kfoc_running")
        if key.layer == "layer 2" and summary.errors[key].mean > 0.02
    ]
    return Claim("K-FOC running below 0.02 on layer 2 at every batch size (means)", exceptions)


def _near_paper(summary: Summary, margin: float) -> Claim:
    exceptions = []
    for method in ESTIMATORS:
        for key, place in _cells(summary, method):
            if key in summary.paper:
                here, there = summary.errors[key].mean, summary.paper[key].mean
                if abs(here - there) > margin:
                    exceptions.append(f"{NAMES[method]}, {place}: {here:.3f}, paper {there:.2f}")
    return Claim(f"every mean within {margin} of the paper's", exceptions)
