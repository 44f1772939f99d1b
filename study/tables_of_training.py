"""Tables of natural gradients, Laplace posteriors and continual learning, from their rows."""

from __future__ import annotations

import math
import statistics
from typing import Any

from kfoc.reproduce.results import Row, distinct, markdown, spread, values, where
from paired import PAIRS, differences, in_order, mean_and_error, ratio, wins

Results = dict[str, dict[str, Any]]
METHODS = ("diagonal", "K-FAC", "K-FOC", "EKFAC", "EK-FOC", "exact blocks")


def best_by(rows: list[Row], score: str) -> list[Row]:
    """A row a seed, of the setting that the search found best by this score."""
    return [row for row in rows if score in row["best by"]]


def geometric(found: list[float]) -> str:
    return f"{math.exp(logarithm(found)):.2g}"


def setting(row: Row) -> str:
    numbers = [row["lr"]] if row["lr"] else [row["damping"], row["kl_clip"]]
    edge = "" if row["inside"] else " (at an edge)"
    return ", ".join(f"{number:.2g}" for number in numbers) + edge


def optimizer(results: Results) -> str:
    """At the best setting by each score; geometric means over seeds."""
    part, lines = results["optimizer"], []
    for network in in_order(distinct(part["rows"], "network")):
        rows = [r for r in where(part["rows"], network=network) if r["method"] in MAIN]
        goal = None
        for method, damped in dict.fromkeys((r["method"], r["damped"]) for r in rows):
            mine = where(rows, method=method, damped=damped)
            fitted, general = best_by(mine, "training"), best_by(mine, "held out")
            goal = goal or max(row["losses"][-1] for row in fitted)
            steps = [
                steps_to(row["losses"], goal, part["settings"]["loss every"]) for row in fitted
            ]
            there = [count for count in steps if count is not None]
            lines.append([
                network, method, damped, f"{tried(mine)}",
                setting(fitted[0]), geometric(values(fitted, "training")),
                f"{statistics.fmean(there):.0f}" if len(there) == len(steps) else "not in all",
                setting(general[0]), geometric(values(general, "test")),
                f"{10 * statistics.fmean(values(fitted, 'seconds')):.1f}",
            ])  # fmt: skip
    header = ["network", "method", "damping by", "tried", "best by training", "training loss"]
    header += ["steps to AdamW's end", "best by held-out", "test loss", "ms a step"]
    return markdown(header, lines, range(3))


MAIN = ("AdamW", "K-FAC", "K-FOC")


def tried(rows: list[Row]) -> int:
    return len({(row["lr"], row["damping"], row["kl_clip"]) for row in rows})


def steps_to(losses: list[float], goal: float, every: int) -> int | None:
    return next((every * (k + 1) for k, loss in enumerate(losses) if loss <= goal), None)


def kinds_of_damping(rows: list[Row], score: str) -> dict[str, list[Row]]:
    """Of K-FAC and K-FOC, the best rows by kind of damping; "best": each network's better kind."""
    found = {kind: best_by(where(rows, damped=kind), score) for kind in ("pi", "exact")}
    chosen = []
    for network in distinct(rows, "network"):
        for method in PAIRS[0]:
            each = [where(found[kind], network=network, method=method) for kind in found]
            if all(each):
                chosen += min(each, key=lambda rows: logarithm(values(rows, score)))
    return found | {"best": chosen}


def logarithm(found: list[float]) -> float:
    return statistics.fmean(map(math.log, found))


def optimizer_pairs(results: Results) -> str:
    """K-FOC's loss by K-FAC's, paired over seeds."""
    rows, lines = results["optimizer"]["rows"], []
    scores = {"training": "training", "held out": "test"}
    by_score = {}
    for network in in_order(distinct(rows, "network")):
        mine = where(rows, network=network)
        for score in scores:
            by_score[score] = kinds_of_damping(mine, score)
        for kind in ("pi", "exact", "best"):
            cells = []
            for score, shown in scores.items():
                logs = list(differences(by_score[score][kind], shown, PAIRS[0], math.log).values())
                cells += [ratio(logs), wins(logs)]
            lines.append([network, kind, *cells])
    header = ["network", "damping by", "training loss, K-FOC / K-FAC", "K-FOC better"]
    return markdown([*header, "test loss, K-FOC / K-FAC", "K-FOC better"], lines, range(2))


def optimizer_why(results: Results) -> str:
    """Curvatures in each other's size, exact damping."""
    rows, lines = where(results["optimizer"]["rows"], damped="exact"), []

    def cells(mine: list[Row], method: str, score: str, shown: str) -> list[str]:
        chosen = best_by(mine, score)
        logs = differences(chosen, shown, (method, "K-FAC"), math.log)
        compared = "" if method == "K-FAC" else ratio(list(logs.values()))
        found = where(chosen, method=method)
        return [setting(found[0]), geometric(values(found, shown)), compared]

    for network in in_order(distinct(where(rows, method="exact blocks"), "network")):
        mine = where(rows, network=network)
        for method in distinct(mine, "method"):
            fitted = cells(mine, method, "training", "training")
            lines.append([network, method, *fitted, *cells(mine, method, "held out", "test")[1:]])
    header = ["network", "curvature", "best by training", "training loss", "by K-FAC's"]
    return markdown([*header, "test loss", "by K-FAC's"], lines, range(2))


def laplace_evidence(results: Results) -> str:
    """Less that of the exact blocks, by sample, each at its own best prior precision."""
    rows, lines = results["laplace"]["rows"], []
    others = METHODS[:-1]
    for network in in_order(distinct(rows, "network")):
        for layers in ("all", "last"):
            mine = where(rows, network=network, layers=layers)
            cells = [
                mean_and_error(list(differences(mine, "evidence", (m, "exact blocks")).values()))
                for m in others
            ]
            lines.append([network, layers, *cells])
    return markdown(["network", "layers", *others], lines, range(2))


def laplace(results: Results) -> str:
    """Test log loss, calibration error in brackets: means over seeds."""
    rows, lines = results["laplace"]["rows"], []
    alone = ("trained network", "temperature scaling")
    for network in in_order(distinct(rows, "network")):
        for layers in ("all", "last"):
            for prefix, prior in (("", "evidence"), ("its ", "held-out")):
                mine = where(rows, network=network)
                chosen = {m: where(mine, method=m, layers="none") for m in alone}
                chosen |= {m: where(mine, method=m, layers=layers) for m in METHODS}
                cells = [
                    f"{statistics.fmean(values(found, prefix + 'NLL')):.3f} "
                    f"({statistics.fmean(values(found, prefix + 'ECE')):.3f})"
                    for found in chosen.values()
                ]
                lines.append([network, layers, prior, *cells])
    return markdown(["network", "layers", "prior by", *alone, *METHODS], lines, range(3))


def off_exact(rows: list[Row]) -> list[Row]:
    """With the distance of the evidence from that of the exact blocks, by sample."""
    exact = {
        (row["network"], row["seed"], row["layers"]): row["evidence"]
        for row in where(rows, method="exact blocks")
    }
    return [
        row | {"off": abs(row["evidence"] - exact[row["network"], row["seed"], row["layers"]])}
        for row in rows
    ]


def strongest(rows: list[Row]) -> list[Row]:
    """Of each network and method, the rows of the strength that does best on validation digits."""
    found: list[Row] = []
    for network, method in dict.fromkeys((row["network"], row["method"]) for row in rows):
        mine = where(rows, network=network, method=method)
        strengths = distinct(mine, "strength")
        best = max(
            strengths, key=lambda s: statistics.fmean(values(mine, "validation", strength=s))
        )
        found += where(mine, strength=best)
    return found


def continual(results: Results) -> str:
    """At the strength that does best on validation digits."""
    rows, lines = results["continual"]["rows"], []
    for network in in_order(distinct(rows, "network")):
        for method in distinct(where(rows, network=network), "method"):
            mine = where(strongest(rows), network=network, method=method)
            cells = [spread([100 * v for v in values(mine, k)], 1) for k in ("test", "forgetting")]
            lines.append([network, method, f"{mine[0]['strength']:.3g}", *cells])
    header = ["network", "curvature", "strength", "accuracy, %", "forgetting, %"]
    return markdown(header, lines, range(2))
