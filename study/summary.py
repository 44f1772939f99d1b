"""All parts at a glance: is the closer product ahead, by how much, by kind of network.

A case is a network and a seed, on which both curvatures of a pair were measured. The difference is
taken within each case, averaged over the seeds of a network and then over the networks of a kind;
its standard error is that of the seeds. Positive differences are those where the first of the pair
does better.
"""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from kfoc.reproduce.results import Row, markdown, where
from networks import KINDS, NETWORKS
from paired import with_error
from tables import Results, chosen_pruning
from tables_of_training import kinds_of_damping, off_exact, strongest

# The measures that the short table shows.
HEADLINES = (
    "relative error of F",
    "gain of the solve, small damping",
    "gain of the solve, large damping",
    "influence against training again, damping 1 x decay",
    "influence against the proximal response, damping 1 x decay",
    "pruning, OBS, accuracy with 70% gone",
    "natural gradient, ln training loss, the better damping",
    "natural gradient, ln test loss, the better damping",
    "Laplace, all layers, evidence, distance from the exact blocks'",
    "Laplace, all layers, log loss, prior by held-out data",
    "five tasks, accuracy",
)
PAIRS = (("K-FOC", "K-FAC"), ("EK-FOC", "EKFAC"), ("K-FOC", "EKFAC"))
Case = tuple[str, int]  # network, seed


@dataclass(frozen=True)
class Measure:
    """What is compared.

    Attributes:
        sign: 1 where more is better, -1 where less is.
        scores: method -> case -> value.
    """

    name: str
    sign: int
    scores: dict[str, dict[Case, float]]


@dataclass(frozen=True)
class Comparison:
    """Of a pair, over the cases of one kind.

    Attributes:
        ahead: the mean difference, positive where the first does better.
        error: its standard error over seeds, of networks with several; nan without any.
        cases, networks: in how many the first is ahead, and of how many.
    """

    ahead: float
    error: float
    cases: tuple[int, int]
    networks: tuple[int, int]

    def __str__(self) -> str:
        won, count = self.cases
        return f"{with_error(self.ahead, self.error)} ({won} of {count})"

    @property
    def told_apart(self) -> bool:
        """Twice the standard error is the usual bound of what chance alone would do."""
        return abs(self.ahead) > 2 * self.error


def compared(measure: Measure, pair: tuple[str, str], kind: str) -> Comparison | None:
    """None where there is no case of both."""
    first, second = (measure.scores.get(method, {}) for method in pair)
    ahead = {
        case: measure.sign * (first[case] - second[case])
        for case in first
        if case in second and NETWORKS[case[0].removeprefix("small ")].kind == kind
    }
    if not ahead:
        return None
    by_network = defaultdict(list)
    for (network, _), value in ahead.items():
        by_network[network].append(value)
    means = [statistics.fmean(found) for found in by_network.values()]
    several = [found for found in by_network.values() if len(found) > 1]
    square = sum(statistics.variance(found) / len(found) for found in several)
    return Comparison(
        statistics.fmean(means),
        square**0.5 / len(means) if several else math.nan,
        (sum(value > 0 for value in ahead.values()), len(ahead)),
        (sum(mean > 0 for mean in means), len(means)),
    )


def verdict(results: Results) -> str:
    """Of the headlines, K-FOC against K-FAC: a line a measure, a column a kind of network."""
    lines = []
    for measure in measures(results):
        if measure.name not in HEADLINES:
            continue
        cells = []
        for kind in KINDS:
            found = compared(measure, PAIRS[0], kind)
            if found is None:
                cells.append("-")
            elif not found.told_apart:
                cells.append(f"even: {found}")
            else:
                cells.append(f"**{PAIRS[0][found.ahead < 0]}**: {found}")
        lines.append([measure.name, *cells])
    return markdown(["measure", *KINDS], lines, range(4))


def summary(results: Results) -> str:
    """All pairs: a line a measure and kind."""
    lines = []
    for measure in measures(results):
        for kind in KINDS:
            found = [compared(measure, pair, kind) for pair in PAIRS]
            if any(found):
                cells = ["-" if each is None else in_full(each) for each in found]
                lines.append([measure.name, kind, *cells])
    header = [f"{first} ahead of {second} by" for first, second in PAIRS]
    return markdown(["measure", "networks", *header], lines, range(2))


def in_full(found: Comparison) -> str:
    won, count = found.networks
    return f"{str(found)[:-1]}; {won} of {count} networks)"


def measures(results: Results) -> Iterator[Measure]:
    for part, make in PARTS.items():
        if part in results:
            yield from make(results[part])


def of_errors(part: dict[str, Any]) -> Iterator[Measure]:
    yield Measure("relative error of F", -1, columns(part["rows"], lambda row: row["error"]))


def of_inverse(part: dict[str, Any]) -> Iterator[Measure]:
    """Dampings below the mean eigenvalue of F, and from it on; means over layers and stages."""
    dampings = part["settings"]["dampings, by the mean eigenvalue"]
    ranges = {
        "small damping": [k for k, d in enumerate(dampings) if d < 0.1],
        "large damping": [k for k, d in enumerate(dampings) if d >= 1],
    }
    names = {
        "solve": "error of the solve",
        "gain": "gain of the solve",
        "logdet": "log-determinant",
    }
    for key, sign in (("solve", -1), ("gain", 1), ("logdet", -1)):
        for name, chosen in ranges.items():

            def score(row: Row, key: str = key, chosen: list[int] = chosen) -> float | None:
                there = [row[key][k] for k in chosen]
                return None if None in there else statistics.fmean(map(abs, there))

            yield Measure(f"{names[key]}, {name}", sign, columns(part["rows"], score))


def of_influence(part: dict[str, Any]) -> Iterator[Measure]:
    rows = where(part["rows"], products=0)
    names = {"retraining": "against training again", "proximal": "against the proximal response"}
    for target, words in names.items():
        for damping in sorted(part["settings"]["dampings, by the weight decay"]):
            found = columns(where(rows, target=target, damping=damping), lambda row: row["pearson"])
            yield Measure(f"influence {words}, damping {damping:g} x decay", 1, found)
        found = columns(where(rows, target=target, damping=1.0), lambda row: row["spearman"])
        yield Measure(f"influence {words}, ranks", 1, found)
    found = columns(where(rows, target="proximal", damping=1.0), lambda row: row["found"])
    yield Measure("mislabelled samples found by influence", 1, found)


def of_pruning(part: dict[str, Any]) -> Iterator[Measure]:
    for order in ("OBD", "OBS"):
        for sparsity in part["settings"]["sparsities"]:
            rows = where(chosen_pruning(part["rows"]), order=order, sparsity=sparsity)
            found = columns(rows, lambda row: row["accuracy"])
            yield Measure(f"pruning, {order}, accuracy with {sparsity:.0%} gone", 1, found)


def of_laplace(part: dict[str, Any]) -> Iterator[Measure]:
    names = {
        "NLL": "log loss, prior by evidence",
        "its NLL": "log loss, prior by held-out data",
        "ECE": "calibration error, prior by evidence",
        "its ECE": "calibration error, prior by held-out data",
    }
    for layers, words in (("all", "Laplace, all layers"), ("last", "Laplace, last layer")):
        rows = off_exact(where(part["rows"], layers=layers))
        found = columns(rows, lambda row: row["off"])
        yield Measure(f"{words}, evidence, distance from the exact blocks'", -1, found)
        for key, name in names.items():
            found = columns(rows, lambda row, key=key: row[key])
            yield Measure(f"{words}, {name}", -1, found)


def of_training(part: dict[str, Any]) -> Iterator[Measure]:
    """Logarithms of losses: 0.1 is a tenth less."""
    for score, shown in (("training", "training"), ("held out", "test")):
        for damped, rows in kinds_of_damping(part["rows"], score).items():
            found = columns(rows, lambda row, shown=shown: math.log(row[shown]))
            words = "the better damping" if damped == "best" else f"{damped} damping"
            yield Measure(f"natural gradient, ln {shown} loss, {words}", -1, found)


def of_continual(part: dict[str, Any]) -> Iterator[Measure]:
    rows = strongest(part["rows"])
    yield Measure("five tasks, accuracy", 1, columns(rows, lambda row: row["test"]))


PARTS: dict[str, Callable[[dict[str, Any]], Iterator[Measure]]] = {
    "errors": of_errors,
    "inverse": of_inverse,
    "influence": of_influence,
    "pruning": of_pruning,
    "optimizer": of_training,
    "laplace": of_laplace,
    "continual": of_continual,
}


def columns(
    rows: Iterable[Row], score: Callable[[Row], float | None]
) -> dict[str, dict[Case, float]]:
    """Method -> case -> the mean of its scores; without cases of which one is missing."""
    found: dict[str, dict[Case, list[float | None]]] = {}
    for row in rows:
        case = row["network"], row["seed"]
        found.setdefault(row["method"], {}).setdefault(case, []).append(score(row))
    return {
        method: {case: statistics.fmean(s) for case, s in cases.items() if None not in s}
        for method, cases in found.items()
    }
