"""What the study's plots share: one look of each method, means with ranges, panels, one legend."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from typing import Any

from matplotlib import pyplot
from matplotlib.figure import Figure

from kfoc.compare.looks import look
from kfoc.reproduce.results import Row, distinct, where
from paired import in_order

# What has no look of its own, and whose it takes.
LIKE = {"exact solve": "optimum", "magnitude": "no curvature"}
SMALL = {"markersize": 3.5, "capsize": 1.2, "linewidth": 0.9}  # where a panel is half a column wide


def style(method: str, line: str = "-") -> dict[str, Any]:
    return {
        **look(LIKE.get(method, method)),
        "markersize": 5,
        "linewidth": 1.4,
        "linestyle": line,
        "label": method,
    }


def points(axis: Any, place: float, found: list[float], method: str, **options: Any) -> None:
    """Mean and range over the seeds, if there are any."""
    if found:
        mean = statistics.fmean(found)
        ends = [[mean - min(found)], [max(found) - mean]]
        axis.errorbar([place], [mean], yerr=ends, **(style(method, "") | {"capsize": 2} | options))


def legend(figure: Figure, axis: Any, rows: int = 1, size: float = 8) -> None:
    """One for all panels, above them."""
    handles, labels = axis.get_legend_handles_labels()
    unique = dict(zip(labels, handles, strict=True))
    columns = -(-len(unique) // rows)
    figure.legend(
        unique.values(), unique.keys(), loc="outside upper center", ncols=columns, fontsize=size
    )


def by_network(rows: list[Row]) -> tuple[Figure, Iterator[tuple[Any, list[Row]]]]:
    """A figure with a panel for each network, and the panels with the rows that belong there."""
    networks = in_order(distinct(rows, "network"))
    figure, axes = pyplot.subplots(
        -(-len(networks) // 3), 3, figsize=(7, 0.9 + 2.1 * -(-len(networks) // 3)), squeeze=False,
        layout="constrained",
    )  # fmt: skip

    def panels() -> Iterator[tuple[Any, list[Row]]]:
        for axis, network in zip(axes.flat, networks, strict=False):
            axis.set_title(network, fontsize=9)
            axis.tick_params(labelsize=8)
            axis.grid(alpha=0.3)
            yield axis, where(rows, network=network)

    for axis in axes.flat[len(networks) :]:
        axis.set_axis_off()
    return figure, panels()
