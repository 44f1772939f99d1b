"""One look of each method, in all pictures: of both commands, the study and the benchmarks."""

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


def look(method: str) -> dict[str, Any]:
    """Colour and marker of a method, as matplotlib takes them."""
    colour, marker = LOOKS.get(method, LOOKS["no curvature"])
    return {"color": colour, "marker": marker}
