"""The picture of the front page: three measures on one network with shared weights."""

from __future__ import annotations

from typing import Any

from matplotlib import pyplot
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from drawing import points, style
from kfoc.compare.looks import COLUMN
from kfoc.reproduce.results import Row, values, where
from plots_of_training import best_by, curve

NETWORK = "tokens"
PRODUCTS = ("K-FAC", "K-FOC", "EKFAC", "EK-FOC")


def gain(errors: dict[str, Any], influence: dict[str, Any], optimizer: dict[str, Any]) -> Figure:
    """Error of the Fisher, correlation of influence, training loss of natural gradients."""
    figure, axes = pyplot.subplots(
        1, 3, figsize=(2 * COLUMN + 0.2, 2.1), layout="constrained", width_ratios=(4, 5, 5)
    )
    trained = where(errors["rows"], network=NETWORK, fisher="exact", stage="trained")
    columns(axes[0], trained, "error", PRODUCTS)
    axes[0].set_title("relative error of the Fisher")
    place = {"network": NETWORK, "target": "proximal", "damping": 1.0, "products": 0}
    methods = (*PRODUCTS, "exact blocks")
    columns(axes[1], where(influence["rows"], **place), "pearson", methods)
    axes[1].set_title("correlation of influence")
    rows = best_by(where(optimizer["rows"], network=NETWORK), "training")
    for method, damped in (("AdamW", ""), ("K-FAC", "exact"), ("K-FOC", "exact")):
        steps = curve(
            where(rows, method=method, damped=damped), optimizer["settings"]["loss every"]
        )
        axes[2].plot(
            *steps, **style(method) | {"markersize": 3.8, "linewidth": 1.1, "markevery": 2}
        )
    axes[2].set(title="training loss", xlabel="steps", yscale="log")
    axes[2].yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes[2].yaxis.set_major_formatter("{x:g}")
    axes[2].yaxis.set_minor_locator(NullLocator())
    axes[2].legend()
    return figure


def columns(axis: Any, rows: list[Row], key: str, methods: tuple[str, ...]) -> None:
    """A column a method: mean and range over seeds, from zero on."""
    for x, method in enumerate(methods):
        look = {"markersize": 5.5, "linewidth": 1.1}
        points(axis, x, values(rows, key, method=method), method, **look)
    axis.set_xticks(range(len(methods)), [method.replace(" ", "\n") for method in methods])
    axis.set(xlim=(-0.5, len(methods) - 0.5), ylim=(0, None))
