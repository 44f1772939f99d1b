"""The two result figures, drawn as in the paper, as PNG and SVG."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import NullLocator

from kfoc.compare.looks import look
from kfoc.files.writing import replacing
from kfoc.reproduce.experiment import ESTIMATORS
from kfoc.reproduce.summary import NAMES, Key, Summary

# The aggregations often lie on one another: those drawn first are wider, so that each still shows.
STYLES: dict[str, dict[str, Any]] = {
    "diagonal": look("diagonal") | {"ms": 6, "lw": 1.8},
    "kfac": look("K-FAC") | {"ms": 6, "lw": 1.8},
    "kfoc_exact": look("optimum") | {"ms": 11, "lw": 5},
    "kfoc_online": look("K-FOC") | {"ms": 8.5, "lw": 3},
    "kfoc_running": look("K-FOC running") | {"ms": 6, "lw": 1.8},
    "kfoc_approx": look("K-FOC approx") | {"ms": 6, "lw": 1.8},
}
# The paper's values stand a little to the right, so that they do not hide ours.
ASIDE = 1.13


def draw(summary: Summary, folder: Path) -> list[Path]:
    """One panel a layer, written to `folder`."""
    style: dict[Any, Any] = {"font.size": 11, "svg.hashsalt": "kfoc"}
    style |= {"axes.spines.top": False, "axes.spines.right": False}
    paths = []
    with rc_context(style):
        figure = Figure(figsize=(5.0 * len(summary.layers), 5.2), layout="constrained")
        axes = figure.subplots(1, len(summary.layers), sharey=True, squeeze=False)[0]
        for panel, layer in zip(axes, summary.layers, strict=True):
            _panel(panel, summary, layer)
        axes[0].set_ylabel("relative error  ‖F − approximation‖ / ‖F‖")
        figure.suptitle(summary.title, fontsize=12)
        figure.legend(handles=_legend(summary), loc="outside lower center", ncols=4, frameon=False)
        for suffix in ("png", "svg"):
            paths.append(folder / f"{summary.name}.{suffix}")
            # Without a date the same results give the same file.
            metadata = {"Date": None} if suffix == "svg" else None
            with replacing(paths[-1]) as path:
                figure.savefig(path, format=suffix, dpi=160, metadata=metadata)
    return paths


def _panel(panel: Axes, summary: Summary, layer: str) -> None:
    sizes, samples = summary.batch_sizes, summary.settings["samples"]
    places = {size: float(samples if size == "all" else size) for size in sizes}
    for method, style in STYLES.items():
        colour = {"color": style["color"]}
        stats = [summary.errors[Key(layer, method, size)] for size in sizes]
        means, low, high = zip(*stats, strict=True)
        panel.fill_between([*places.values()], low, high, alpha=0.13, lw=0, **colour)
        panel.plot([*places.values()], means, mec="white", mew=0.6, **style)
        faint = {"fmt": style["marker"], "ms": 6, "mfc": "none", "alpha": 0.55, "zorder": 4}
        faint |= {"elinewidth": 1, "capsize": 2} | colour
        for size, place in places.items():
            if stat := summary.paper.get(Key(layer, method, size)):
                ends = [[stat.mean - stat.low], [stat.high - stat.mean]]
                panel.errorbar(ASIDE * place, stat.mean, ends, **faint)
    panel.axhline(summary.optimum(layer).mean, color="black", lw=1.2, ls="--", zorder=3)
    labels = [f"all\n({samples:,})" if size == "all" else f"{size:,}" for size in sizes]
    panel.set(xscale="log", xlabel="batch size", title=layer.capitalize(), ylim=(-0.03, 1.03))
    panel.set_xticks([*places.values()], labels)
    panel.xaxis.set_minor_locator(NullLocator())
    panel.grid(axis="y", color="#e5e5e5", lw=0.8)
    panel.set_axisbelow(True)


def _legend(summary: Summary) -> list[Line2D]:
    handles = [
        Line2D([], [], mec="white", mew=0.6, label=NAMES[method], **STYLES[method])
        for method in ESTIMATORS
    ]
    handles.append(Line2D([], [], color="black", lw=1.2, ls="--", label="optimum of the whole set"))
    if summary.paper:
        faint: dict[str, Any] = {"color": "#555555", "marker": "o", "mfc": "none", "alpha": 0.6}
        handles.append(Line2D([], [], lw=0, ms=6, label="the paper's mean and range", **faint))
    return handles
