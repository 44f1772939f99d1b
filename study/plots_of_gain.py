"""The picture of the front page: three measures on one network with shared weights."""

from __future__ import annotations

from typing import Any

from matplotlib import pyplot
from matplotlib.figure import Figure

from drawing import PAGE, logarithmic, points, style
from kfoc.reproduce.results import Row, values, where
from plots_of_training import best_by, curve

NETWORK = "tokens"
PRODUCTS = ("K-FAC", "K-FOC", "EKFAC", "EK-FOC")


def gain(errors: dict[str, Any], influence: dict[str, Any], optimizer: dict[str, Any]) -> Figure:
    """Error of the Fisher, correlation of influence, training loss of natural gradients."""
    figure, axes = pyplot.subplots(
        1, 3, figsize=(PAGE, 2.1), layout="constrained", width_ratios=(4, 5, 5)
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
        axes[2].plot(*steps, **style(method), markevery=2)
    axes[2].set(title="training loss", xlabel="steps")
    logarithmic(axes[2])
    axes[2].legend()
    return figure


def columns(axis: Any, rows: list[Row], key: str, methods: tuple[str, ...]) -> None:
    """A column a method: mean and range over seeds, from zero on."""
    for x, method in enumerate(methods):
        points(axis, x, values(rows, key, method=method), method, markersize=5.5)
    axis.set_xticks(range(len(methods)), [method.replace(" ", "\n") for method in methods])
    axis.set(xlim=(-0.5, len(methods) - 0.5), ylim=(0, None))
