"""What the study's plots share: one look of each method, means with ranges, panels, one legend."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from typing import Any

import matplotlib
from matplotlib import pyplot
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from kfoc.compare.looks import COLUMN, look
from kfoc.reproduce.results import Row, distinct, where
from paired import in_order

matplotlib.use("Agg")  # files, and no windows

# What has no look of its own, and whose it takes.
LIKE = {"exact solve": "optimum", "magnitude": "no curvature"}
PAGE = 2 * COLUMN + 0.2  # inches: two columns
SMALL = {"markersize": 3.5, "capsize": 1.2, "linewidth": 0.9}  # where a panel is half a column wide


def style(method: str, line: str = "-") -> dict[str, Any]:
    return look(LIKE.get(method, method)) | {"linestyle": line, "label": method}


def points(axis: Any, place: float, found: list[float], method: str, **options: Any) -> None:
    """Mean and range over the seeds, if there are any."""
    if found:
        mean = statistics.fmean(found)
        ends = [[mean - min(found)], [max(found) - mean]]
        axis.errorbar([place], [mean], yerr=ends, **(style(method, "") | {"capsize": 2} | options))


def logarithmic(axis: Any) -> None:
    """Upwards, with numbers as one reads them."""
    axis.set(yscale="log")
    least, most = axis.get_ylim()
    few = (1,) if most > 100 * least else (1, 2, 5)
    axis.yaxis.set_major_locator(LogLocator(subs=few if most > 3 * least else (2, 2.5, 3)))
    axis.yaxis.set_major_formatter("{x:g}")
    axis.yaxis.set_minor_locator(NullLocator())


def legend(figure: Figure, axis: Any, rows: int = 1) -> None:
    """One for all panels, above them."""
    handles, labels = axis.get_legend_handles_labels()
    unique = dict(zip(labels, handles, strict=True))
    columns = -(-len(unique) // rows)
    figure.legend(unique.values(), unique.keys(), loc="outside upper center", ncols=columns)


def by_network(rows: list[Row]) -> tuple[Figure, Iterator[tuple[Any, list[Row]]]]:
    """A figure with a panel for each network, and the panels with the rows that belong there."""
    networks = in_order(distinct(rows, "network"))
    lines = -(-len(networks) // 3)
    figure, axes = pyplot.subplots(
        lines, 3, figsize=(PAGE, 0.9 + 1.9 * lines), squeeze=False, layout="constrained"
    )

    def panels() -> Iterator[tuple[Any, list[Row]]]:
        for axis, network in zip(axes.flat, networks, strict=False):
            axis.set_title(network)
            yield axis, where(rows, network=network)

    for axis in axes.flat[len(networks) :]:
        axis.set_axis_off()
    return figure, panels()
