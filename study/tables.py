"""The study's tables in Markdown, one function a table, from the rows of the parts."""

from __future__ import annotations

import itertools
import statistics
from typing import Any

from kfoc.reproduce.results import Row, distinct, markdown, spread, values, where
from networks import KINDS, NETWORKS

NAMES = ("diagonal", "K-FAC", "K-FOC", "EKFAC", "EK-FOC", "K-FOC, rank 2")
INFLUENCE = (
    "no curvature", "diagonal", "K-FAC", "K-FOC", "EKFAC", "EK-FOC", "exact blocks", "exact solve",
)  # fmt: skip
PRUNING = ("diagonal", "K-FAC", "K-FOC", "EKFAC", "EK-FOC", "exact blocks")
Results = dict[str, dict[str, Any]]  # part -> what its file holds


def errors(results: Results) -> str:
    """Mean over layers of the relative error; ± over the seeds."""
    rows, lines = results["errors"]["rows"], []
    for network in distinct(rows, "network"):
        for fisher in distinct(where(rows, network=network), "fisher"):
            for stage in distinct(rows, "stage"):
                cell = {"network": network, "fisher": fisher, "stage": stage}
                found = [spread(values(rows, "error", method=m, **cell)) for m in NAMES]
                lines.append([network, fisher, stage, *found])
    return markdown(["network", "Fisher", "stage", *NAMES], lines, range(3))


def by_damping(results: Results, key: str) -> str:
    """Medians over layers, networks and seeds; with how many the library refused."""
    part = results["inverse"]
    dampings = part["settings"]["dampings, by the mean eigenvalue"]
    lines = []
    for stage in distinct(part["rows"], "stage"):
        for method in NAMES:
            columns = [row[key] for row in where(part["rows"], stage=stage, method=method)]
            cells = [middle([column[k] for column in columns]) for k in range(len(dampings))]
            if any(cell != "-" for cell in cells):
                lines.append([stage, method, *cells])
    return markdown(["stage", "curvature", *(f"{d:g}" for d in dampings)], lines, range(2))


def percent(found: Any) -> str:
    return f"{100 * statistics.fmean(found):.1f}"


def middle(found: list[float | None]) -> str:
    """The median of the sizes where none is missing; else how many are."""
    there = [value for value in found if value is not None]
    if len(there) == len(found):
        return f"{statistics.median(map(abs, there)):.2f}"
    return f"{len(found) - len(there)} of {len(found)} refused" if there else "-"


def bands(results: Results) -> str:
    """Shares of trace F in percent, means over layers and seeds, of trained networks."""
    rows = where(results["inverse"]["rows"], stage="trained")
    names = list(rows[0]["bands"])
    lines = []
    for network in distinct(rows, "network"):
        mine = where(rows, network=network)
        lines.append(
            [network, "F itself", *(percent(r["bands"][n][0] for r in mine) for n in names)]
        )
        gradient = (percent(r["gradient"][n] for r in mine) for n in names)
        for method in NAMES:
            found = where(mine, method=method)
            cells = (percent(r["bands"][n][1] for r in found) for n in names)
            lines.append([network, method, *cells])
        lines.append([network, "the mean gradient's square", *gradient])
    return markdown(["network", "", *names], lines, range(2))


def overshoot(results: Results) -> str:
    """Medians over layers and seeds."""
    part = results["inverse"]
    rows, dampings = part["rows"], part["settings"]["overshoot at"]
    lines = []
    for network in distinct(rows, "network"):
        for method in NAMES:
            line = [network, method]
            for stage in distinct(rows, "stage"):
                columns = [
                    row["overshoot"]
                    for row in where(rows, network=network, stage=stage, method=method)
                ]
                line += [middle([column[k] for column in columns]) for k in range(len(dampings))]
            lines.append(line)
    header = [f"{stage}, {d:g}" for stage in distinct(rows, "stage") for d in dampings]
    return markdown(["network", "curvature", *header], lines, range(2))


def benchmark(results: Results) -> str:
    """Of benchmarks/optimizer.py: one seed, larger networks."""
    lines = []
    for row in results["benchmark"]["rows"]:
        there = [f"{row['setting']:g}", str(row["steps"]), f"{row['seconds']:.2f}"]
        lines.append([row["problem"], row["method"], *there, f"{row['lowest loss']:.4f}"])
    header = ["problem", "method", "lr or kl_clip", "steps to AdamW's best", "seconds"]
    return markdown([*header, "lowest loss"], lines, range(2))


def best(rows: list[Row], score: str = "final", of: str = "setting") -> list[Row]:
    """The rows, one a seed, of the setting with the lowest mean score."""
    chosen = min(
        distinct(rows, of),
        key=lambda each: statistics.fmean(values(rows, score, **{of: each})),
    )
    return where(rows, **{of: chosen})


def influence(results: Results) -> str:
    """Correlations of predicted and real changes of loss, and mislabelled samples found."""
    rows, lines = where(results["influence"]["rows"], products=0), []
    cases = [(d, "pearson") for d in sorted(distinct(rows, "damping"))] + [(1.0, "spearman")]
    for network in distinct(rows, "network"):
        mine = where(rows, network=network)
        for target in sorted(distinct(mine, "target"), reverse=True):
            for damping, key in cases:
                cell = {"target": target, "damping": damping}
                found = [spread(values(mine, key, method=m, **cell), 2) for m in INFLUENCE]
                words = {"pearson": "values", "spearman": "ranks"}[key]
                lines.append([network, target, f"{damping:g}", words, *found])
        cell = {"target": "proximal", "damping": 1.0}
        found = [spread(values(mine, "found", method=m, **cell), 2) for m in INFLUENCE]
        lines.append([network, "mislabelled, found", "1", "", *found])
    return markdown(["network", "target", "damping", "of", *INFLUENCE], lines, range(4))


def products(results: Results) -> str:
    """By the number of products with the true Fisher: means over the networks of a kind."""
    rows, lines = where(results["influence"]["rows"], target="proximal", damping=1.0), []
    counts = sorted(distinct(rows, "products"))
    for queries, kind in itertools.product(("alone", "together"), KINDS):
        mine = [row for row in rows if NETWORKS[row["network"]].kind == kind]
        for method in INFLUENCE[:-1] if mine else ():
            first = values(mine, "pearson", method=method, products=0)
            found = [
                values(mine, "pearson", method=method, products=k, queries=queries)
                for k in counts[1:]
            ]
            cells = [f"{statistics.fmean(each):.2f}" for each in [first, *found]]
            lines.append([queries, kind, method, *cells])
    return markdown(["queries", "networks", "curvature", *map(str, counts)], lines, range(3))


def pruning(results: Results) -> str:
    """Accuracies in percent, at the damping of the lowest held-out loss."""
    rows, lines = chosen_pruning(results["pruning"]["rows"]), []

    def cell(**wanted: Any) -> str:
        return spread([100 * v for v in values(rows, "accuracy", **wanted)], 1)

    for network in distinct(rows, "network"):
        for sparsity in distinct(where(rows, method="magnitude"), "sparsity"):
            for order in ("OBD", "OBS"):
                place = {"network": network, "sparsity": sparsity}
                found = [cell(method=m, order=order, **place) for m in PRUNING]
                whole = cell(network=network, method="whole network")
                magnitude = cell(method="magnitude", **place)
                lines.append([network, whole, f"{sparsity:.0%}", order, magnitude, *found])
    header = ["network", "whole", "gone", "order", "magnitude", *PRUNING]
    return markdown(header, lines, (0, 2, 3))


def chosen_pruning(rows: list[Row]) -> list[Row]:
    """Of each network, method, order and sparsity the rows of the damping that does best."""
    keys = ("network", "method", "order", "sparsity")
    found = []
    for case in dict.fromkeys(tuple(row[key] for key in keys) for row in rows):
        mine = where(rows, **dict(zip(keys, case, strict=True)))
        found += best(mine, "held-out loss", "damping") if mine[0]["order"] else mine
    return found
