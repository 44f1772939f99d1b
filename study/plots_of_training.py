"""Plots of natural gradients, Laplace posteriors and continual learning."""

from __future__ import annotations

import math
import statistics
from typing import Any

from matplotlib import pyplot
from matplotlib.figure import Figure

from drawing import PAGE, by_network, legend, logarithmic, points, style
from kfoc.reproduce.results import Row, distinct, values, where
from paired import differences, error_of_mean, in_order
from tables_of_training import MAIN, METHODS, best_by


def optimizer(part: dict[str, Any]) -> Figure:
    """The curve of each method's setting of the lowest training loss."""
    rows, every = best_by(part["rows"], "training"), part["settings"]["loss every"]
    figure, panels = by_network(rows)
    for axis, mine in panels:
        for method, damped in dict.fromkeys((r["method"], r["damped"]) for r in mine):
            if method in MAIN:
                line = style(method, "--" if damped == "exact" else "-") | {"markevery": 4}
                kind = {"pi": ", factored damping", "exact": ", exact damping", "": ""}[damped]
                line["label"] = method + kind
                axis.plot(*curve(where(mine, method=method, damped=damped), every), **line)
        logarithmic(axis)
    figure.supxlabel("steps")
    figure.supylabel("training loss")
    legend(figure, figure.axes[0], rows=2)
    return figure


def curve(rows: list[Row], every: int) -> tuple[list[float], list[float]]:
    """Steps, and the training loss there: geometric means over seeds."""
    at_once = zip(*(row["losses"] for row in rows), strict=True)
    logs = [[math.log(max(loss, 1e-12)) for loss in at] for at in at_once]
    middle = [math.exp(statistics.fmean(at)) for at in logs]
    return [every * (k + 0.5) for k in range(len(middle))], middle


def laplace(part: dict[str, Any]) -> Figure:
    """Distance of the evidence from the exact blocks', and log losses against the network's own."""
    rows = where(part["rows"], layers="all")
    # Beyond, nothing but the prior is left of any of them.
    priors = [prior for prior in part["settings"]["evidence at priors"] if prior < 2e3]
    networks = in_order(distinct(rows, "network"))
    figure, axes = pyplot.subplots(1, 3, figsize=(PAGE, 3), layout="constrained")
    kept = {(r["network"], r["seed"], r["method"]): r["evidences"] for r in rows}

    def gap(row: Row, method: str, k: int) -> float:
        case = row["network"], row["seed"]
        return abs(kept[(*case, method)][k] - kept[(*case, "exact blocks")][k])

    for method in METHODS[:-1]:
        mine = where(rows, method=method)
        shares = [
            statistics.fmean(gap(row, method, k) / gap(row, "diagonal", k) for row in mine)
            for k in range(len(priors))
        ]
        axes[0].plot(priors, shares, **style(method))
    axes[0].set(xscale="log", xlabel="prior precision", ylim=(0, 1.05))
    axes[0].set_title("evidence: off the exact blocks',\nby how far the diagonal's is")
    alone = where(part["rows"], layers="none")
    for axis, key, prior in zip(
        axes[1:], ("NLL", "its NLL"), ("evidence", "held-out data"), strict=True
    ):
        for x, network in enumerate(networks):
            for k, method in enumerate((*METHODS, "temperature scaling")):
                both = where([*rows, *alone], network=network)
                found = list(differences(both, key, (method, "trained network")).values())
                points(axis, x + 0.11 * (k - 3), found, method)
        axis.axhline(0, color="black", linewidth=0.7)
        axis.set_xticks(range(len(networks)), networks, rotation=30)
        axis.set_title(f"log loss less the network's,\nprior by {prior}")
    legend(figure, axes[1])
    return figure


def continual(part: dict[str, Any]) -> Figure:
    """Accuracy after all tasks by strength: means over seeds, with their standard errors."""
    networks = in_order(distinct(part["rows"], "network"))
    figure, axes = pyplot.subplots(
        1, len(networks), figsize=(PAGE, 2.6), sharey=True, squeeze=False, layout="constrained"
    )
    for axis, network in zip(axes[0], networks, strict=True):
        rows = where(part["rows"], network=network)
        without = statistics.fmean(values(rows, "test", method="no penalty"))
        axis.axhline(100 * without, color="black", linewidth=0.8, linestyle=":")
        for method in METHODS:
            mine = where(rows, method=method)
            strengths = sorted(distinct(mine, "strength"))
            found = [[100 * v for v in values(mine, "test", strength=s)] for s in strengths]
            means, errors = map(statistics.fmean, found), map(error_of_mean, found)
            axis.errorbar(strengths, list(means), list(errors), capsize=2, **style(method))
        axis.set(xscale="log", xlabel="strength x samples")
        axis.set_title(network)
    axes[0, 0].set_ylabel("accuracy after all tasks, %")
    legend(figure, axes[0, 0], rows=2)
    return figure
