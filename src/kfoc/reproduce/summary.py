"""Statistics over seeds, the paper's values beside them, and which claims they bear out."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
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

    by_seed: {key: {seed: relative error}}.
    """

    name: str
    settings: dict[str, Any]
    by_seed: dict[Key, dict[int, float]]

    @cached_property
    def errors(self) -> dict[Key, Stat]:
        return {key: Stat.over(found.values()) for key, found in self.by_seed.items()}

    @cached_property
    def paper(self) -> dict[Key, Stat]:
        """The paper's, empty where it did not run on this data."""
        return paper_values(self.name) if self.settings["comparable with the paper"] else {}

    @property
    def layers(self) -> list[str]:
        return sorted({key.layer for key in self.by_seed})

    @property
    def batch_sizes(self) -> list[BatchSize]:
        return self.settings["batch sizes"]

    @property
    def title(self) -> str:
        seeds = len(next(iter(self.by_seed.values())))
        name = self.name.replace("_", " ").capitalize()
        return f"{name}: {self.settings['curvature of']}, {seeds} seed{'s' * (seeds > 1)}"

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
        sizes = settings[name]["batch sizes"]
        fits = [(method, size) for method in ESTIMATORS for size in sizes]
        fits += [("optimum", "all"), *((kind, sizes[-1]) for kind in AGAINST_EXACT)]
        layers = {key.layer for found in by_seed.values() for key in found}
        wanted = [Key(layer, *fit) for layer in layers for fit in fits]
        seeds = {s: found for s, found in sorted(by_seed.items()) if found.keys() >= set(wanted)}
        if seeds:
            each = {key: {seed: found[key] for seed, found in seeds.items()} for key in wanted}
            summaries.append(Summary(name, settings[name], each))
    return summaries


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


class Claim(NamedTuple):
    """A statement on the results and what speaks against it; none of that: it holds."""

    text: str
    exceptions: list[str]

    @property
    def verdict(self) -> str:
        return "does not hold" if self.exceptions else "holds"


def claims(summary: Summary) -> list[Claim]:
    """The paper's claims, and those on this library's own aggregations."""

    def mean(key: Key) -> float:
        return summary.errors[key].mean

    def claim(text: str, method: str, exception: Callable[[Key], str | None]) -> Claim:
        keys = [Key(layer, method, s) for layer in summary.layers for s in summary.batch_sizes]
        found = [(key, exception(key)) for key in keys]
        return Claim(text, [f"{k.layer}, batch size {k.batch_size}: {e}" for k, e in found if e])

    def not_above(method: str, other: str) -> Claim:
        def exception(key: Key) -> str | None:
            here, there = mean(key), mean(key._replace(method=other))
            return f"{here:.4f} against {there:.4f}" if here > there + TIE else None

        text = f"{NAMES[method]} at or below {NAMES[other]} on every layer, at every batch size"
        return claim(f"{text} (means; ties within {TIE})", method, exception)

    def near_optimum(method: str, margin: float) -> Claim:
        def exception(key: Key) -> str | None:
            best = summary.by_seed[Key(key.layer, "optimum", "all")]
            gap = max(error - best[seed] for seed, error in summary.by_seed[key].items())
            return f"{gap:.4f} above it" if gap > margin else None

        text = f"{NAMES[method]} within {margin} of the whole set's optimum on every layer"
        return claim(f"{text}, at every batch size, for every seed", method, exception)

    def near_paper(margin: float) -> Claim:
        exceptions = [
            f"{NAMES[k.method]}, {k.layer}, batch size {k.batch_size}: {mean(k):.3f},"
            f" paper {stat.mean:.2f}"
            for k, stat in summary.paper.items()
            if k in summary.errors and abs(mean(k) - stat.mean) > margin
        ]
        return Claim(f"every mean within {margin} of the paper's", exceptions)

    found = [
        not_above("kfoc_running", "kfac"),
        not_above("kfoc_running", "kfoc_approx"),
        near_optimum("kfoc_online", 0.002),
        near_optimum("kfoc_exact", 0.001),
    ]
    if summary.name == "fully_connected":
        text = "K-FOC running below 0.02 on layer 2 at every batch size (means)"
        found.append(
            claim(
                text,
                "kfoc_running",
                lambda k: f"{mean(k):.4f}" if k.layer == "layer 2" and mean(k) > 0.02 else None,
            )
        )
    if summary.name == "fully_connected" and summary.paper:
        found.append(near_paper(0.1))
    return found
