"""One table over all parts: how often the closer product did better, on the same network and seed.

A case is one measurement that both curvatures of a pair have: same network, stage, layer, seed and
damping. Cases that share a network are not independent: the counts describe, they do not test.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from kfoc.reproduce.results import Row, markdown, values, where
from tables import Results, best, strongest

PAIRS = (("K-FOC", "K-FAC"), ("EK-FOC", "EKFAC"), ("EK-FOC", "K-FOC"))
Case = tuple[Any, ...]
Scores = dict[Case, float]


def summary(results: Results) -> str:
    header = ["measure", *(f"{first} better than {second}" for first, second in PAIRS)]
    lines = []
    for name, sign, scores in measures(results):
        cells = []
        for first, second in PAIRS:
            found = [scores.get(method, {}) for method in (first, second)]
            common = [case for case in found[0] if case in found[1]]
            won = sum(sign * found[0][case] > sign * found[1][case] for case in common)
            cells.append(f"{won} of {len(common)}" if common else "-")
        lines.append([name, *cells])
    return markdown(header, lines)


def measures(results: Results) -> Iterator[tuple[str, int, dict[str, Scores]]]:
    """A name, 1 where more is better and -1 where less is, and the scores by method."""
    keys = ("network", "fisher", "stage", "seed")
    yield "relative error", -1, columns(results["errors"]["rows"], "error", keys)
    yield from of_inverse(results["inverse"])
    for key, name in (("NLL", "log loss"), ("ECE", "calibration error")):
        for prefix, prior in (("", "the evidence"), ("its ", "held-out digits")):
            found = columns(results["laplace"]["rows"], prefix + key, ("network", "seed"))
            yield f"Laplace, {name}, prior by {prior}", -1, found
    for damped in results["optimizer"]["settings"]["damping by"]:
        rows = where(results["optimizer"]["rows"], damped=damped)
        methods = {row["method"] for row in rows}
        chosen = [row for method in methods for row in best(where(rows, method=method))]
        yield f"training loss, damping by {damped}", -1, columns(chosen, "final", ("seed",))
    rows = results["continual"]["rows"]
    chosen = [row for m in {r["method"] for r in rows} for row in strongest(rows, m)]
    yield "five tasks, accuracy", 1, columns(chosen, "test", ("seed",))
    rows = results["influence"]["rows"]
    for damping in results["influence"]["settings"]["dampings, by the weight decay"]:
        found = columns(where(rows, damping=damping), "correlation", ("seed",))
        yield f"influence, correlation, damping {damping:g} x decay", 1, found


def of_inverse(part: dict[str, Any]) -> Iterator[tuple[str, int, dict[str, Scores]]]:
    """Dampings below the mean eigenvalue of F, and from it on."""
    dampings = part["settings"]["dampings, by the mean eigenvalue"]
    ranges = {
        "small damping": [k for k, d in enumerate(dampings) if d < 0.1],
        "large damping": [k for k, d in enumerate(dampings) if d >= 1],
    }
    for key, sign in (("solve", -1), ("gain", 1), ("solve, random", -1), ("logdet", -1)):
        for name, chosen in ranges.items():
            found: dict[str, Scores] = {}
            for row in part["rows"]:
                case = row["network"], row["stage"], row["layer"], row["seed"]
                for k in chosen:
                    if row[key][k] is not None:
                        found.setdefault(row["method"], {})[(*case, k)] = abs(row[key][k])
            words = {"solve": "solve, mean gradient", "gain": "gain, mean gradient"}.get(key, key)
            yield f"{words}, {name}", sign, found


def columns(rows: list[Row], key: str, by: tuple[str, ...]) -> dict[str, Scores]:
    """Method -> case -> value."""
    found: dict[str, Scores] = {}
    for row in rows:
        if values([row], key):
            found.setdefault(row["method"], {})[tuple(row[each] for each in by)] = row[key]
    return found
