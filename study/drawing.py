"""What the study's plots share: one look of each method, means with ranges, one legend."""

from __future__ import annotations

import statistics
from typing import Any

from matplotlib.figure import Figure

from kfoc.compare.looks import look

# What has no look of its own, and whose it takes.
LIKE = {"exact solve": "optimum", "magnitude": "no curvature"}


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


def legend(figure: Figure, axis: Any, rows: int = 1) -> None:
    """One for all panels, above them."""
    handles, labels = axis.get_legend_handles_labels()
    unique = dict(zip(labels, handles, strict=True))
    columns = -(-len(unique) // rows)
    figure.legend(
        unique.values(), unique.keys(), loc="outside upper center", ncols=columns, fontsize=8
    )
