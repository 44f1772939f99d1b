"""Plots over the six networks: parts f and g."""

from __future__ import annotations

import statistics
from typing import Any

from matplotlib import pyplot
from matplotlib.figure import Figure

from drawing import PAGE, by_network, legend, points, style
from kfoc.reproduce.results import distinct, values, where
from tables import INFLUENCE, PRUNING, chosen_pruning


def influence(part: dict[str, Any]) -> Figure:
    """A panel a target: correlations at a damping of the weight decay, networks along."""
    rows = where(part["rows"], damping=1.0, products=0)
    titles = {
        "retraining": "training again without the sample",
        "proximal": "proximal Bregman response",
    }
    figure, axes = pyplot.subplots(2, 1, figsize=(PAGE, 4.6), layout="constrained")
    for axis, (target, title) in zip(axes, titles.items(), strict=True):
        networks = distinct(where(rows, target=target), "network")
        for x, network in enumerate(networks):
            for k, method in enumerate(INFLUENCE):
                cell = {"target": target, "network": network, "method": method}
                place = x + 0.1 * (k - (len(INFLUENCE) - 1) / 2)
                points(axis, place, values(rows, "pearson", **cell), method)
        axis.set_xticks(range(len(networks)), networks)
        axis.set_ylabel("correlation")
        axis.set_title(title)
    legend(figure, axes[1], rows=2)
    return figure


def products(part: dict[str, Any]) -> Figure:
    """A panel a network: correlations by the number of products, each query alone."""
    rows = where(part["rows"], damping=1.0, target="proximal")
    counts = sorted(distinct(rows, "products"))
    figure, panels = by_network(rows)
    for axis, mine in panels:
        for method in INFLUENCE[:-1]:
            first = values(mine, "pearson", method=method, products=0)
            found = [
                values(mine, "pearson", method=method, products=k, queries="alone")
                for k in counts[1:]
            ]
            axis.plot([statistics.fmean(each) for each in [first, *found]], **style(method))
        axis.set_xticks(range(len(counts)), counts)
    figure.supxlabel("products with the true Fisher")
    figure.supylabel("correlation with the proximal response")
    legend(figure, figure.axes[0], rows=2)
    return figure


def pruning(part: dict[str, Any]) -> Figure:
    """A panel a network: accuracy by the share of weights gone; the rest adjusted."""
    rows = chosen_pruning(part["rows"])
    sparsities = part["settings"]["sparsities"]
    figure, panels = by_network(rows)
    for axis, mine in panels:
        whole = statistics.fmean(values(mine, "accuracy", method="whole network"))
        for method in ("magnitude", *PRUNING[1:]):
            order = "" if method == "magnitude" else "OBS"
            found = [
                statistics.fmean(values(mine, "accuracy", method=method, order=order, sparsity=s))
                for s in sparsities
            ]
            axis.plot([0, *sparsities], [whole, *found], **style(method))
    figure.supxlabel("share of weights gone")
    figure.supylabel("accuracy")
    legend(figure, figure.axes[0], rows=2)
    return figure
