"""Charts as inline SVG. Colours are classes, which the page's style sheet gives in both schemes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from typing import NamedTuple

from kfoc.compare.words import measured

# Units are CSS pixels at the width of a narrow phone's column; the page lets charts grow a little.
WIDTH = 320
LABEL, VALUE = 64, 96
ROW, BAR = 20, 11
LEFT, RIGHT, TOP, BOTTOM, HEIGHT = 46, 10, 8, 34, 190


class Bar(NamedTuple):
    """One bar: the estimator's key (for its colour), its label, the value and its error."""

    key: str
    label: str
    value: float
    deviation: float


class Line(NamedTuple):
    """One line: the estimator's key, its label, and its points."""

    key: str
    label: str
    x: Sequence[float]
    y: Sequence[float]


def bars(entries: Sequence[Bar], limit: float, title: str) -> str:
    """Horizontal bars from 0 to `limit` with whiskers of one standard error, and their numbers."""
    span = WIDTH - LABEL - VALUE
    height = ROW * len(entries) + 2
    described = "; ".join(f"{b.label} {measured(b.value, b.deviation)}" for b in entries)
    parts = [_open(height, f"{title}: {described}")]
    for place in (0.5, 1.0):
        if place <= limit:
            x = LABEL + span * place / limit
            parts.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="0" y2="{height}"/>')
    for row, bar in enumerate(entries):
        middle = ROW * row + ROW / 2 + 1
        length = span * min(bar.value, limit) / limit
        parts.append(
            f'<text class="tick" x="{LABEL - 8}" y="{middle + 4}" text-anchor="end">'
            f"{escape(bar.label)}</text>"
            f'<rect class="fill {bar.key}" x="{LABEL}" y="{middle - BAR / 2}" '
            f'width="{length:.1f}" height="{BAR}"/>'
        )
        deviation = 0.0 if math.isnan(bar.deviation) else bar.deviation
        ends = [min(max(bar.value + s * deviation, 0.0), limit) for s in (-1, 1)]
        low, high = (LABEL + span * end / limit for end in ends)
        parts.append(
            f'<path class="whisker" d="M{low:.1f} {middle}H{high:.1f}'
            f'M{low:.1f} {middle - 3}v6M{high:.1f} {middle - 3}v6"/>'
            f'<text class="number" x="{WIDTH}" y="{middle + 4}" text-anchor="end">'
            f"{measured(bar.value, bar.deviation)}</text>"
        )
    parts.append(f'<line class="axis" x1="{LABEL}" x2="{LABEL}" y1="0" y2="{height}"/></svg>')
    return "".join(parts)


class _Axis:
    """A logarithmic axis over values: where they lie, and its ticks."""

    def __init__(self, values: Sequence[float], start: float, end: float) -> None:
        logs = [math.log10(value) for value in values]
        self.low, self.high = min(logs), max(logs)
        if self.high - self.low < 0.3:
            middle = (self.high + self.low) / 2
            self.low, self.high = middle - 0.15, middle + 0.15
        self.start, self.end = start, end

    def __call__(self, value: float) -> float:
        share = (math.log10(value) - self.low) / (self.high - self.low)
        return self.start + share * (self.end - self.start)

    def ticks(self, most: int) -> list[float]:
        """Powers of ten within the range, every so many; in a short one, multiples of them."""
        first, last = math.ceil(self.low - 1e-9), math.floor(self.high + 1e-9)
        every = -(-(last - first + 1) // most)
        found = [10.0**e for e in range(first, last + 1) if every < 2 or e % every == 0]
        for digits in ((1, 2, 5), (1, 2, 3, 4, 5, 6, 8)):
            if len(found) < 3:
                near = range(first - 1, last + 2)
                finer = [m * 10.0**e for e in near for m in digits]
                found = [t for t in finer if self.low - 1e-9 <= math.log10(t) <= self.high + 1e-9]
        return found


def lines(
    drawn: Sequence[Line], x_label: str, y_label: str, title: str, *, dots: bool = True
) -> str:
    """Lines on two logarithmic axes."""
    x = _Axis([v for line in drawn for v in line.x], LEFT, WIDTH - RIGHT)
    y = _Axis([v for line in drawn for v in line.y], HEIGHT - BOTTOM, TOP)
    described = "; ".join(
        f"{line.label} from {line.y[0]:.2g} to {line.y[-1]:.2g}" for line in drawn
    )
    parts = [_open(HEIGHT, f"{title}: {described}")]
    for tick in y.ticks(5):
        parts.append(
            f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(tick):.1f}" '
            f'y2="{y(tick):.1f}"/><text class="tick" x="{LEFT - 5}" y="{y(tick) + 4:.1f}" '
            f'text-anchor="end">{_power(tick)}</text>'
        )
    for tick in x.ticks(5):
        parts.append(
            f'<line class="notch" x1="{x(tick):.1f}" x2="{x(tick):.1f}" y1="{HEIGHT - BOTTOM}" '
            f'y2="{HEIGHT - BOTTOM + 4}"/><text class="tick" x="{x(tick):.1f}" '
            f'y="{HEIGHT - BOTTOM + 15}" text-anchor="middle">{_plain(tick)}</text>'
        )
    for line in drawn:
        points = [f"{x(a):.1f} {y(b):.1f}" for a, b in zip(line.x, line.y, strict=True)]
        parts.append(f'<path class="line {line.key}" d="M{"L".join(points)}"/>')
        if dots or len(points) == 1:
            parts += [
                f'<circle class="fill {line.key}" cx="{x(a):.1f}" cy="{y(b):.1f}" r="2.5"/>'
                for a, b in zip(line.x, line.y, strict=True)
            ]
    parts.append(
        f'<path class="axis" d="M{LEFT} {TOP}V{HEIGHT - BOTTOM}H{WIDTH - RIGHT}"/>'
        f'<text class="tick" x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 4}" '
        f'text-anchor="middle">{escape(x_label)}</text>'
        f"<title>{escape(y_label)}</title></svg>"
    )
    return "".join(parts)


def _open(height: int, description: str) -> str:
    return f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(description)}">'


def _power(value: float) -> str:
    """A tick of the vertical axis: 0.1 as such, small and large ones as powers of ten."""
    exponent = round(math.log10(value))
    if not math.isclose(value, 10.0**exponent, rel_tol=1e-6) or -2 <= exponent <= 2:
        return f"{value:.2g}" if value < 100 else f"{value:.0f}"
    return f'10<tspan dy="-4" class="exponent">{str(exponent).replace("-", "−")}</tspan>'


def _plain(value: float) -> str:
    if value >= 1e6:
        return f"{value / 1e6:g} M"
    return f"{value / 1e3:g} k" if value >= 1e4 else f"{value:g}"
