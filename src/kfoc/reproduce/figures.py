"""The two result figures, as PNG and SVG: the paper's, and how far above the optimum each lies."""

from __future__ import annotations

import math
import textwrap
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.legend_handler import HandlerTuple
from matplotlib.lines import Line2D
from matplotlib.ticker import NullLocator

from kfoc.compare.looks import COLUMN, STYLE, look
from kfoc.reproduce.experiment import ESTIMATORS
from kfoc.reproduce.results import save
from kfoc.reproduce.summary import NAMES, Key, Stat, Summary

LOOKS: dict[str, dict[str, Any]] = {
    "diagonal": look("diagonal"),
    "kfac": look("K-FAC"),
    "kfoc_approx": look("K-FOC approx"),
    "kfoc_running": look("K-FOC running"),
    "kfoc_online": look("K-FOC"),
    "kfoc_exact": look("optimum"),
}
# Methods that may agree stand beside one another, by these factors of the batch size.
ASIDE = {
    "diagonal": 0.84,
    "kfac": 1.19,
    "kfoc_approx": 0.6,
    "kfoc_running": 0.84,
    "kfoc_online": 1.19,
    "kfoc_exact": 1.67,
}
# An excess below is rounding, or the power iteration's last step, and is drawn there.
FLOOR = 1e-6


def draw(summary: Summary, folder: Path) -> list[Path]:
    """Two panels a layer, one above the other, written to `folder`."""
    with rc_context(STYLE):
        columns = len(summary.layers)
        figure = Figure(figsize=(COLUMN * max(1.0, columns / 2), 4.3), layout="constrained")
        axes = figure.subplots(2, columns, sharex=True, sharey="row", squeeze=False)
        for (upper, lower), layer in zip(axes.T, summary.layers, strict=True):
            _errors(upper, summary, layer)
            _excess(lower, summary, layer)
            _sizes(lower, summary)
        axes[0, 0].set_ylabel("relative error")
        axes[1, 0].set_ylabel("above the optimum by")
        title = (textwrap.fill(part, 27 * columns) for part in summary.title.split(": ", 1))
        figure.suptitle("\n".join(title), fontsize=7.5)
        together = {tuple: HandlerTuple(ndivide=None, pad=0.3)}
        handles, labels = _legend(summary)
        place: dict[str, Any] = {"loc": "outside lower center", "ncols": 2}
        figure.legend(handles, labels, handler_map=together, **place)
        return save(figure, folder / f"{summary.name}.png")


def _places(summary: Summary, method: str) -> dict[Any, float]:
    """Batch size -> where along the axis."""
    samples, aside = summary.settings["samples"], ASIDE[method]
    return {s: aside * (samples if s == "all" else s) for s in summary.batch_sizes}


def _errors(panel: Axes, summary: Summary, layer: str) -> None:
    for method in ESTIMATORS:
        places = _places(summary, method)
        keys = {size: Key(layer, method, size) for size in places}
        _series(panel, places, {s: summary.errors[key] for s, key in keys.items()}, method)
        style = _paper(method) | {"elinewidth": 0.7, "zorder": 1.5}
        for size, place in places.items():
            if stat := summary.paper.get(keys[size]):
                ends = [[stat.mean - stat.low], [stat.high - stat.mean]]
                panel.errorbar(place, stat.mean, ends, **style)
    panel.axhline(summary.optimum(layer).mean, color="black", lw=0.8, ls="--", zorder=1)
    panel.set(title=layer.capitalize(), ylim=(-0.03, 1.03))


def _excess(panel: Axes, summary: Summary, layer: str) -> None:
    best = summary.by_seed[Key(layer, "optimum", "all")]
    for method in ESTIMATORS:
        places, found = _places(summary, method), {}
        for size in places:
            errors = summary.by_seed[Key(layer, method, size)]
            above = Stat.over(error - best[seed] for seed, error in errors.items())
            found[size] = Stat(*(max(value, FLOOR) for value in above))
        _series(panel, places, found, method)
    panel.set(yscale="log", ylim=(FLOOR / 2, 2))
    powers = range(round(math.log10(FLOOR)), 1)
    labels = [f"{'≤ ' * (power == powers[0])}$10^{{{power}}}$" for power in powers]
    panel.set_yticks([10.0**power for power in powers], labels)
    panel.yaxis.set_minor_locator(NullLocator())


def _series(panel: Axes, places: dict[Any, float], found: dict[Any, Stat], method: str) -> None:
    """Means over the seeds, with their ranges."""
    means, low, high = zip(*found.values(), strict=True)
    ends = [
        [m - a for m, a in zip(means, low, strict=True)],
        [b - m for m, b in zip(means, high, strict=True)],
    ]
    panel.errorbar([*places.values()], means, ends, **_style(method), clip_on=False, zorder=3)


def _style(method: str) -> dict[str, Any]:
    return LOOKS[method] | {"lw": 0.8, "elinewidth": 0.9}


def _paper(method: str) -> dict[str, Any]:
    """Hollow and larger, so that it shows around what agrees with it."""
    hollow = {"mfc": "none", "mec": LOOKS[method]["color"], "ms": 5.6, "mew": 0.7, "alpha": 0.75}
    return LOOKS[method] | hollow | {"ls": ""}


def _sizes(panel: Axes, summary: Summary) -> None:
    """The axis of batch sizes."""
    samples = summary.settings["samples"]
    places = {f"all\n({samples:,})" if s == "all" else f"{s:,}": s for s in summary.batch_sizes}
    ticks = [samples if size == "all" else size for size in places.values()]
    panel.set(xscale="log", xlabel="batch size")
    panel.set_xticks(ticks, list(places))
    panel.xaxis.set_minor_locator(NullLocator())


def _legend(summary: Summary) -> tuple[list[Any], list[str]]:
    """Handles and labels."""
    handles: list[Any] = []
    for method in ESTIMATORS:
        style = _style(method)
        del style["elinewidth"]
        handles.append(Line2D([], [], **style))
    labels = [NAMES[method] for method in ESTIMATORS]
    handles.append(Line2D([], [], color="black", lw=0.8, ls="--"))
    labels.append("optimum of the whole set")
    if summary.paper:
        shown = dict.fromkeys(key.method for key in summary.paper)
        handles.append(tuple(Line2D([], [], **_paper(m)) for m in shown))
        labels.append("the paper's mean and range")
    return handles, labels
