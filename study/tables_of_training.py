"""Tables of natural gradients, Laplace posteriors and continual learning, from their rows."""

from __future__ import annotations

import math
import statistics
from typing import Any

from kfoc.reproduce.results import Row, distinct, markdown, spread, values, where
from paired import PAIRS, by_seed, differences, in_order, mean_and_error, ratio, wins

Results = dict[str, dict[str, Any]]
METHODS = ("diagonal", "K-FAC", "K-FOC", "EKFAC", "EK-FOC", "exact blocks")


def best_by(rows: list[Row], score: str) -> list[Row]:
    """A row a seed, of the setting that the search found best by this score."""
    return [row for row in rows if score in row["best by"]]


def geometric(found: list[float]) -> str:
    return f"{math.exp(statistics.fmean(map(math.log, found))):.2g}" if found else "-"


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
    """The best rows of each method by kind of damping; "best" is the better kind of each."""
    found = {kind: best_by(where(rows, damped=kind), score) for kind in ("pi", "exact")}
    chosen = []
    for method in ("K-FAC", "K-FOC"):
        each = [where(found[kind], method=method) for kind in found]
        chosen += min(
            (rows for rows in each if rows),
            key=lambda rows: statistics.fmean(math.log(row[score]) for row in rows),
            default=[],
        )
    return found | {"best": chosen}


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
    networks = in_order(distinct(where(rows, method="exact blocks"), "network"))
    for network in networks:
        for method in distinct(where(rows, network=network), "method"):
            mine = where(rows, network=network, method=method)
            fitted, general = best_by(mine, "training"), best_by(mine, "held out")
            both = where(rows, network=network)
            logs = list(
                differences(
                    best_by(both, "training"), "training", (method, "K-FAC"), math.log
                ).values()
            )
            tests = list(
                differences(best_by(both, "held out"), "test", (method, "K-FAC"), math.log).values()
            )
            lines.append([
                network, method, setting(fitted[0]), geometric(values(fitted, "training")),
                "" if method == "K-FAC" else ratio(logs),
                geometric(values(general, "test")), "" if method == "K-FAC" else ratio(tests),
            ])  # fmt: skip
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


def laplace_pairs(results: Results) -> str:
    """The closer product against the other, over networks and seeds."""
    rows, lines = results["laplace"]["rows"], []
    exact = {
        (r["network"], r["seed"], r["layers"]): r["evidence"]
        for r in where(rows, method="exact blocks")
    }
    off = [
        row | {"off": abs(row["evidence"] - exact[row["network"], row["seed"], row["layers"]])}
        for row in rows
        if row["layers"] != "none"
    ]
    measures = {
        "evidence, distance from that of the exact blocks": "off",
        "log loss, prior by the evidence": "NLL",
        "calibration error, prior by the evidence": "ECE",
        "log loss, prior by held-out data": "its NLL",
        "calibration error, prior by held-out data": "its ECE",
    }
    for layers in ("all", "last"):
        for name, key in measures.items():
            cells = []
            for pair in PAIRS:
                found = differences(where(off, layers=layers), key, pair)
                cells += [mean_and_error(by_seed(found), 4), wins(list(found.values()))]
            lines.append([layers, name, *cells])
    header = ["layers", "measure"]
    for first, second in PAIRS:
        header += [f"{first} less {second}", f"{first} better"]
    return markdown(header, lines, range(2))


def continual(results: Results) -> str:
    """At the strength that does best on validation digits."""
    rows, lines = results["continual"]["rows"], []
    for network in in_order(distinct(rows, "network")):
        for method in distinct(where(rows, network=network), "method"):
            mine = where(rows, network=network, method=method, best=True)
            cells = [spread([100 * v for v in values(mine, k)], 1) for k in ("test", "forgetting")]
            lines.append([network, method, f"{mine[0]['strength']:.3g}", *cells])
    header = ["network", "curvature", "strength", "accuracy, %", "forgetting, %"]
    return markdown(header, lines, range(2))


def continual_pairs(results: Results) -> str:
    rows, lines = where(results["continual"]["rows"], best=True), []
    pairs = (*PAIRS, ("exact blocks", "K-FAC"), ("exact blocks", "K-FOC"))
    for first, second in pairs:
        cells = []
        for network in in_order(distinct(rows, "network")):
            found = differences(where(rows, network=network), "test", (first, second))
            percent = [100 * value for value in found.values()]
            cells.append(f"{mean_and_error(percent, 1)}, {wins(percent, 1)}")
        lines.append([f"{first} less {second}", *cells])
    return markdown(["accuracy, %", *in_order(distinct(rows, "network"))], lines)
