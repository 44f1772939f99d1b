"""Numbers in words that fit a table."""

from __future__ import annotations

import math


def duration(seconds: float) -> str:
    """Such as "3.2 ms", "0.45 s", "12.3 s", "3.1 min"."""
    if seconds < 0.1:
        return f"{seconds * 1e3:.1f} ms"
    if seconds < 10:
        return f"{seconds:.2f} s"
    return f"{seconds:.1f} s" if seconds < 120 else f"{seconds / 60:.1f} min"


def measured(value: float, deviation: float) -> str:
    """A value with its standard error, where there are such: a single probe has no spread."""
    if math.isnan(value):
        return "–"
    return f"{value:.3f}" if math.isnan(deviation) else f"{value:.3f} ± {deviation:.3f}"


def quantity(count: int) -> str:
    """Three digits and a prefix of thousands: "812 ", "4.67 k", "21.3 M", with room for a unit."""
    size, prefixes = float(count), ["", "k", "M", "G", "T"]
    while size >= 999.5 and len(prefixes) > 1:
        size /= 1000
        prefixes.pop(0)
    return f"{size:.3g} {prefixes[0]}"
