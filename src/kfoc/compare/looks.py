"""One look of each method, in all pictures: of both commands, the study and the benchmarks.

And one of the pictures themselves: as wide as a column of a paper, where they can be read without
being enlarged.
"""

from __future__ import annotations

from typing import Any

# Okabe and Ito's palette, which colour-blind readers can tell apart, and three more; the markers
# say it again. All can be seen on light pages and on dark ones.
LOOKS = {
    "diagonal": ("#777777", "X"),
    "K-FAC": ("#d55e00", "s"),
    "K-FOC": ("#0072b2", "o"),
    "K-FOC approx": ("#a6761d", "<"),
    "K-FOC running": ("#56b4e9", ">"),
    "K-FOC, rank 2": ("#66a61e", "v"),
    "EKFAC": ("#c5709f", "D"),
    "EK-FOC": ("#009e73", "^"),
    "optimum": ("#7570b3", "h"),
    "exact blocks": ("#000000", "*"),
    "no curvature": ("#e69f00", "P"),
}
COLUMN = 3.3  # inches
# Parameters of matplotlib: for pictures of that width, and panels of half of it.
STYLE: dict[Any, Any] = {
    "font.size": 7.5,
    "axes.titlesize": 7.5,
    "axes.labelsize": 7.5,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "figure.labelsize": 7.5,
    "legend.fontsize": 7,
    "legend.title_fontsize": 7,
    "legend.frameon": False,
    "legend.handlelength": 1.8,
    "legend.columnspacing": 1.2,
    "lines.linewidth": 1.1,
    "lines.markersize": 3.8,
    "lines.markeredgecolor": "white",
    "lines.markeredgewidth": 0.3,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": "#e5e5e5",
    "grid.linewidth": 0.6,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "xtick.major.size": 2.5,
    "ytick.major.size": 2.5,
    "savefig.dpi": 300,
    "svg.hashsalt": "kfoc",  # the same picture is the same file
}


def look(method: str) -> dict[str, Any]:
    """Colour and marker of a method, as matplotlib takes them."""
    colour, marker = LOOKS.get(method, LOOKS["no curvature"])
    return {"color": colour, "marker": marker}
