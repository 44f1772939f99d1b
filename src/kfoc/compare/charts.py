"""Charts as inline SVG, and images of matrices, by matplotlib."""

from __future__ import annotations

import base64
import io
import math
import re
from collections.abc import Mapping
from html import escape
from typing import Any

import matplotlib.style
from matplotlib.figure import Figure
from matplotlib.image import imsave
from matplotlib.ticker import LogLocator, NullLocator
from torch import Tensor

from kfoc.compare.convergence import Curve
from kfoc.compare.looks import look
from kfoc.compare.style import LIGHT
from kfoc.compare.words import measured, quantity

# CSS pixels at the width of a narrow phone's column; the page lets charts grow a little.
WIDTH = 320
LABEL, VALUE, ROW = 64, 96, 20
SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
# Of positive and of negative entries; how far from zero is in the opacity, so that the same image
# does on a light page and on a dark one.
POSITIVE, NEGATIVE = (47, 111, 196), (208, 90, 46)
STYLE = {
    "svg.fonttype": "none",
    "font.size": 11,
    "xtick.color": LIGHT["soft"],
    "ytick.color": LIGHT["soft"],
    "axes.labelcolor": LIGHT["soft"],
    "axes.edgecolor": LIGHT["soft"],
    "text.color": LIGHT["ink"],
    "grid.color": LIGHT["rule"],
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "ytick.major.size": 0,
}


def bars(entries: Mapping[str, tuple[float, float]], limit: float, title: str) -> str:
    """Horizontal bars from 0 to `limit` with whiskers of one standard error, and their numbers.

    Args:
        entries: estimator's label -> the value and its standard error.
    """
    described = "; ".join(f"{label} {measured(*entry)}" for label, entry in entries.items())
    with matplotlib.style.context(["default", STYLE]):
        figure, axes = _axes(ROW * len(entries) + 2, LABEL, VALUE, 0, 0)
        axes.set(xlim=(0, limit), ylim=(len(entries) - 0.5, -0.5))
        axes.spines["bottom"].set_visible(False)
        axes.set_xticks([x for x in (0.5, 1.0) if x <= limit], [])
        axes.tick_params(axis="x", length=0)
        axes.grid(axis="x", clip_on=False)
        axes.set_yticks(range(len(entries)), list(entries))
        for row, (label, (value, deviation)) in enumerate(entries.items()):
            length = min(value, limit)
            spread = 0.0 if math.isnan(deviation) else deviation
            whisker = [[min(spread, length)], [min(spread, limit - length)]]
            axes.barh(row, length, 0.55, color=look(label)["color"], clip_on=False)
            thin: dict[str, Any] = {"color": LIGHT["ink"], "elinewidth": 1, "capsize": 3}
            axes.errorbar(length, row, xerr=whisker, fmt="none", clip_on=False, **thin)
            place = {"transform": figure.transFigure, "ha": "right", "va": "center_baseline"}
            axes.text(1, 1 - (row + 0.5) / len(entries), measured(value, deviation), **place)
        return _inline(figure, f"{title}: {described}")


def lines(drawn: Mapping[str, Curve], x_label: str, title: str, *, dots: bool = True) -> str:
    """Lines on two logarithmic axes, by the estimator's label."""
    ends = ((label, curve.y[0], curve.y[-1]) for label, curve in drawn.items())
    described = "; ".join(f"{label} from {first:.2g} to {last:.2g}" for label, first, last in ends)
    with matplotlib.style.context(["default", STYLE]):
        figure, axes = _axes(190, 46, 10, 8, 36)
        for label, curve in drawn.items():
            style = look(label) | {"markersize": 5, "linewidth": 1.8, "clip_on": False}
            if not dots and len(curve.x) > 1:
                style["marker"] = ""
            axes.loglog(*curve, **style)
        axes.margins(0)
        for axis in (axes.xaxis, axes.yaxis):
            _ticks(axis)
        axes.xaxis.set_major_formatter(lambda value, _: quantity(round(value)).strip())
        axes.grid(axis="y", clip_on=False)
        axes.set_xlabel(x_label, labelpad=2)
        return _inline(figure, f"{title}: {described}")


def image(matrix: Tensor) -> str:
    """A PNG as data URI of a matrix with entries from -1 to 1."""
    pixels = matrix.new_zeros(*matrix.shape, 4)
    pixels[..., :3] = matrix.new_tensor(NEGATIVE)
    pixels[matrix > 0, :3] = matrix.new_tensor(POSITIVE)
    pixels[..., 3] = (255 * matrix.abs()).round()
    content = io.BytesIO()
    imsave(content, pixels.byte().numpy(), format="png", metadata={"Software": "kfoc"})
    return "data:image/png;base64," + base64.b64encode(content.getvalue()).decode()


def _axes(height: int, left: int, right: int, top: int, bottom: int) -> tuple[Figure, Any]:
    """Axes in a figure, with so many pixels around them."""
    figure = Figure(figsize=(WIDTH / 72, height / 72))
    size = (1 - (left + right) / WIDTH, 1 - (top + bottom) / height)
    axes = figure.add_axes((left / WIDTH, bottom / height, *size))
    figure.patch.set_visible(False)
    axes.patch.set_visible(False)
    return figure, axes


def _ticks(axis: Any) -> None:
    """Powers of ten, or multiples of them in a short range; a very short one is made longer."""
    low, high = axis.get_view_interval()
    if high < 2 * low:
        low, high = low / 1.4, high * 1.4
        getattr(axis.axes, f"set_{axis.axis_name}lim")(low, high)
    subs = (1, 2, 5) if high < 100 * low else (1,)
    axis.set_major_locator(LogLocator(subs=subs, numticks=6))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(lambda value, _: _plain(value))


def _plain(value: float) -> str:
    """0.1 as such, small and large ones as powers of ten."""
    if 0.01 <= value < 1000:
        return f"{value:g}"
    digits, _, exponent = f"{value:.0e}".partition("e")
    power = "10" + str(int(exponent)).translate(SUPERSCRIPTS)
    return power if digits == "1" else f"{digits}·{power}"


def _inline(figure: Figure, description: str) -> str:
    """The figure for inside a page: its text is text in the page's font, its colours the page's."""
    content = io.StringIO()
    empty = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    # By their description, ids that are referred to differ from those of other charts of the page.
    with matplotlib.rc_context({"svg.hashsalt": description}):
        figure.savefig(content, format="svg", metadata=empty)
    text = content.getvalue()
    body = text[text.index(">", text.index("<svg")) + 1 :]
    for pattern, replacement in (
        (r"<defs>\s*<style.*?</defs>|<metadata>.*?</metadata>|<!--.*?-->", ""),  # of whole pages
        (r' id="[\w.]+_\d+"', ""),  # the same in every chart
        (r"xlink:href", "href"),
        (r"font: ([\d.]+px) [^;]*", r"font-size: \1"),
        (r"font-family: [^;]*; ", ""),
        (r' transform="rotate\(-0 [^"]*"|<g ?/>', ""),
        (r"\s+", " "),
        (r" ?([<>]) ", r"\1"),
    ):
        body = re.sub(pattern, replacement, body, flags=re.S)
    for name, colour in LIGHT.items():
        body = body.replace(colour, f"var(--{name})")
    width, height = (round(72 * side) for side in figure.get_size_inches())
    label = escape(description)
    return f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{label}">{body}'
