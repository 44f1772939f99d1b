"""Plots of what people do with a curvature: parts c to e."""

from __future__ import annotations

import statistics
from typing import Any

from matplotlib import pyplot
from matplotlib.figure import Figure

from drawing import legend, points, style
from kfoc.reproduce.results import distinct, values, where
from tables import best, strongest


def laplace(part: dict[str, Any]) -> Figure:
    """Log loss and calibration error, at the prior of the evidence and of held-out digits."""
    rows = part["rows"]
    panels = {
        "NLL": "test log loss, prior by evidence",
        "its NLL": "test log loss, prior by held-out digits",
        "ECE": "calibration error, prior by evidence",
        "its ECE": "calibration error, prior by held-out digits",
    }
    networks = distinct(rows, "network")
    figure, axes = pyplot.subplots(1, 4, figsize=(13, 3.6), layout="constrained")
    for axis, (key, title) in zip(axes, panels.items(), strict=True):
        for x, network in enumerate(networks):
            for k, method in enumerate(distinct(rows, "method")):
                # The trained network has no prior: it is shown beside both.
                column = key.removeprefix("its ") if method == "trained network" else key
                found = values(rows, column, network=network, method=method)
                points(axis, x + 0.11 * (k - 3), found, method)
        axis.set_xticks(range(len(networks)), [name.split()[0] for name in networks])
        axis.set_title(title, fontsize=9)
        axis.set_xlim(-0.6, len(networks) - 0.4)
        axis.grid(axis="y", alpha=0.3)
    legend(figure, axes[-1])
    return figure


def optimizer(part: dict[str, Any]) -> Figure:
    """The mean curve of each method's best setting, and every setting's end."""
    rows, every = part["rows"], part["settings"]["loss every"]
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    kinds = list(dict.fromkeys((row["damped"], row["method"]) for row in rows))
    for x, (damped, method) in enumerate(kinds):
        mine = where(rows, damped=damped, method=method)
        look = style(method, "--" if damped == "exact" else "-")
        label = f"{method}, {damped}".removesuffix(", ")
        curves = [row["losses"] for row in best(mine)]
        steps = [every * (k + 1) for k in range(len(curves[0]))]
        mean = [statistics.fmean(at) for at in zip(*curves, strict=True)]
        left.plot(steps, mean, **(look | {"label": label}))
        left.fill_between(
            steps, [min(at) for at in zip(*curves, strict=True)],
            [max(at) for at in zip(*curves, strict=True)], color=look["color"], alpha=0.12,
        )  # fmt: skip
        settings = distinct(mine, "setting")
        ends = sorted(statistics.fmean(values(mine, "final", setting=s)) for s in settings)
        right.plot([x] * len(ends), ends, **(look | {"linestyle": ""}))
    left.set(yscale="log", xlabel="steps", ylabel="training loss", title="best setting of each")
    right.set(yscale="log", title="every setting, at the last step")
    right.set_xticks(range(len(kinds)), [f"{method}\n{damped}" for damped, method in kinds])
    left.legend(fontsize=8)
    return figure


def continual(part: dict[str, Any]) -> Figure:
    """Accuracy and forgetting of each method, at its best strength."""
    rows = part["rows"]
    figure, axes = pyplot.subplots(1, 3, figsize=(12, 3.6), layout="constrained")
    names = distinct(rows, "method")
    for axis, key in zip(axes[:2], ("test", "forgetting"), strict=True):
        for x, method in enumerate(names):
            points(axis, x, [100 * v for v in values(strongest(rows, method), key)], method)
        axis.set_xticks(range(len(names)), names, rotation=30, ha="right")
        axis.set_ylabel("accuracy after all tasks, %" if key == "test" else "forgetting, %")
        axis.grid(axis="y", alpha=0.3)
    for method in names:
        strengths = [s for s in distinct(where(rows, method=method), "strength") if s]
        found = [100 * statistics.fmean(values(rows, "test", method=method, strength=s))
                 for s in strengths]  # fmt: skip
        axes[2].plot(strengths, found, **style(method))
    axes[2].set(xscale="log", xlabel="strength x samples", ylabel="accuracy after all tasks, %")
    axes[2].grid(alpha=0.3)
    legend(figure, axes[2])
    return figure
