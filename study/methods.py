"""Names of the curvatures in tables, and the one colour that each has in all plots.

Without torch: tables and plots are made of files.
"""

from __future__ import annotations

NAMES = ("diagonal", "K-FAC", "K-FOC", "EKFAC", "EK-FOC", "K-FOC, rank 2")

# Okabe and Ito's palette, which colour-blind readers can tell apart; the markers say it again.
COLOURS = {
    "diagonal": "#999999",
    "K-FAC": "#E69F00",
    "K-FOC": "#0072B2",
    "EKFAC": "#D55E00",
    "EK-FOC": "#56B4E9",
    "K-FOC, rank 2": "#009E73",
    "exact blocks": "#000000",
    "AdamW": "#CC79A7",
    "trained network": "#CC79A7",
    "no penalty": "#CC79A7",
}
MARKERS = {
    "diagonal": "x",
    "K-FAC": "s",
    "K-FOC": "o",
    "EKFAC": "D",
    "EK-FOC": "^",
    "K-FOC, rank 2": "v",
    "exact blocks": "*",
    "AdamW": "+",
    "trained network": "+",
    "no penalty": "+",
}
