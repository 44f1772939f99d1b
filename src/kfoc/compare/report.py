"""The comparison as one HTML file that needs nothing beside itself."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from html import escape

from kfoc.compare.charts import bars, image, lines
from kfoc.compare.looks import look
from kfoc.compare.measure import ESTIMATORS, Entry, Layer, Study
from kfoc.compare.pictures import Heatmap
from kfoc.compare.style import sheet
from kfoc.compare.table import OVERVIEW, overview
from kfoc.compare.words import duration, quantity

# So many layers are shown unfolded.
UNFOLDED = 3


def page(study: Study) -> str:
    """The report."""
    title = f"Curvature estimators on {study.title}"
    settings = "".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>"
        for name, value in study.settings.items()
    )
    body = [
        "<h1>Curvature estimators compared</h1>",
        f"<p class='soft'>On <code>{escape(study.title)}</code>: how far each estimate of the "
        "Fisher information is from the exact block, layer by layer, and what it costs.</p>",
        f"<dl>{settings}</dl>",
        _overview(study),
        _errors(study),
        _layers(study),
        _numbers(study),
        _skipped(study),
        _method(study),
    ]
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        # A browser would ask the server of the page, if there is one, for an icon.
        '<link rel="icon" href="data:,">'
        f"<title>{escape(title)}</title><style>{sheet()}</style></head>\n"
        f"<body><main>{chr(10).join(part for part in body if part)}</main></body></html>\n"
    )


def _table(label: str, heads: Sequence[str], rows: Iterable[str], words: int = 1) -> str:
    """A table that scrolls by itself; rows are HTML, and the first columns are words."""
    columns = "".join(
        f"<th scope='col'{' class=text' * (k < words)}>{head}</th>" for k, head in enumerate(heads)
    )
    lines = "".join(f"<tr>{row}</tr>" for row in rows)
    return (
        f"<h2>{label}</h2><div class='scroll' tabindex='0' role='region' aria-label='{label}'>"
        f"<table><thead><tr>{columns}</tr></thead><tbody>{lines}</tbody></table></div>"
    )


def _cells(cells: Iterable[str], words: int = 0) -> str:
    return "".join(f"<td{' class=text' * (k < words)}>{cell}</td>" for k, cell in enumerate(cells))


def _swatched(study: Study, name: str) -> str:
    label = study.labels[name]
    colour = f"background:{look(label)['color']}"
    return f"<span class='swatch' style='{colour}'></span>{escape(label)}"


def _overview(study: Study) -> str:
    rows = (
        f"<th scope='row'>{_swatched(study, name)}</th>{_cells(cells)}"
        for name, cells in overview(study).items()
    )
    meanings = "; ".join(
        f"{escape(label)}: {escape(ESTIMATORS[name].meaning)}"
        for name, label in study.labels.items()
    )
    table = _table("Estimators", ("estimator", *OVERVIEW), rows)
    return f"{table}<p class='soft note'>{meanings}.</p>"


def _errors(study: Study) -> str:
    errors = [entry.error for layer in study.layers for entry in layer.entries.values()]
    # The same scale at every layer; an error can exceed 1. One hopeless estimate must not make all
    # others' bars invisible: its number says it all.
    limit = min(max([1.0, *errors]), 2.0)
    figures = "".join(
        f"<figure><h3>{_name(layer)} <span class='soft size'>{_shape(layer)}</span></h3>"
        f"{_bars(study, layer, limit)}</figure>"
        for layer in study.layers
    )
    cut = " Longer bars are cut there." if limit == 2.0 else ""
    drawn = " F is that of the drawn labels, noise and all." if study.drawn else ""
    return (
        "<h2>Relative error of every layer</h2>"
        f"<p class='soft'>‖F − estimate‖ / ‖F‖ from 0 to {limit:.3g}, smaller is better; whiskers "
        f"are one standard error.{drawn}{cut} An estimate of zero has the error 1.</p>"
        f"<div class='grid-of'>{figures}</div>"
    )


def _bars(study: Study, layer: Layer, limit: float) -> str:
    entries = {
        study.labels[name]: (entry.error, entry.standard_error)
        for name, entry in layer.entries.items()
    }
    return bars(entries, limit, f"Relative errors of layer {layer.name or '(the model)'}")


def _name(layer: Layer) -> str:
    return f"<code>{escape(layer.name)}</code>" if layer.name else "(the model itself)"


def _shape(layer: Layer) -> str:
    return f"{layer.shape[0]:,} × {layer.shape[1]:,}"


def _layers(study: Study) -> str:
    entries = [entry for layer in study.layers for entry in layer.entries.values()]
    if not any(entry.heatmaps or entry.spectrum for entry in entries):
        return ""
    parts = []
    for number, layer in enumerate(study.layers):
        best = study.closest(layer)
        unfolded = " open" if number < UNFOLDED else ""
        maps = [
            _map(study.labels[name], picture)
            for name, entry in layer.entries.items()
            for picture in entry.heatmaps
        ]
        parts.append(
            f"<details{unfolded}><summary><span class='title'>{_name(layer)}</span>"
            f"<span class='soft'>{_shape(layer)}, closest: {escape(study.labels[best])} "
            f"{layer.entries[best].error:.3f}</span></summary><div class='grid-of'>"
            f"{_curves(study, layer)}<div class='maps'>{''.join(maps)}</div></div></details>"
        )
    legend = "".join(f"<li>{_swatched(study, name)}</li>" for name in study.labels)
    return (
        "<h2>Spectra, convergence and factors</h2>"
        f"<ul class='legend'>{legend}</ul>"
        "<p class='soft'>Images of factors: the signed root of each entry over the largest, "
        "<span class='whole'>negative <span class='scale' role='img' "
        "aria-label='from orange over clear to blue'></span> positive</span>; factors of more than "
        f"64 rows or columns by the means of blocks of entries.</p>{''.join(parts)}"
    )


def _curves(study: Study, layer: Layer) -> str:
    # Head -> lines, what is along, the chart's title, and what is below it.
    charts = {
        "Eigenvalues": (
            {
                study.labels[name]: entry.spectrum
                for name, entry in layer.entries.items()
                if entry.spectrum
            },
            "rank",
            "Eigenvalues of the estimates",
            "Of the estimates of F, those above rounding.",
        ),
        "Power iteration": (
            {"K-FOC": layer.by_step} if layer.by_step else {},
            "half steps",
            "Convergence of the power iteration",
            f"1 − σ/σ∞ of the plain iteration on the first batch ({study.first_batch:,} samples).",
        ),
        "Estimates by samples": (
            {study.labels[name]: curve for name, curve in layer.by_samples.items()},
            "samples",
            "Distance to the final estimate",
            f"‖estimate − final‖ / ‖final‖; final: all {study.num_samples:,} samples.",
        ),
    }
    return "".join(
        f"<figure><h4>{head}</h4>{lines(drawn, along, title, dots=head != 'Eigenvalues')}"
        f"<figcaption>{escape(note)}</figcaption></figure>"
        for head, (drawn, along, title, note) in charts.items()
        if drawn
    )


def _map(label: str, picture: Heatmap) -> str:
    size = f"{picture.shape[0]:,} × {picture.shape[1]:,}"
    words = f"{label}: {picture.name}, {size}"
    return (
        f"<figure class='map'><img src='{image(picture.pixels)}' alt='{escape(words)}'>"
        f"<figcaption><b>{escape(label)}</b><br>{escape(picture.name)}, "
        f"<span class='whole'>{size}</span></figcaption></figure>"
    )


def _numbers(study: Study) -> str:
    rows = []
    for layer in study.layers:
        best = study.closest(layer)
        for position, (name, entry) in enumerate(layer.entries.items()):
            head = (
                f'<th scope="rowgroup" rowspan="{len(layer.entries)}" class="name">{_name(layer)}'
                f'<br><span class="soft">{_shape(layer)}</span></th>'
            )
            errors = [_figure(e) for e in (entry.error, entry.standard_error)]
            errors += [_figure(e) for e in (entry.fisher_error, entry.fisher_error_std)]
            if name == best:
                errors[0] = f"<b>{errors[0]}</b>"
            words = _swatched(study, name), escape(entry.structure), escape(entry.plan) or "–"
            cells = _cells((*words, *errors, *_costs(entry)), len(words))
            rows.append((head if not position else "") + cells)
    heads = ("layer", "estimator", "structure", "plan", "error", "std. error")
    costs = ("to the Fisher itself", "its std. error", "time", "half steps", "numbers", "bytes")
    return _table("All numbers", (*heads, *costs), rows, 4)


def _figure(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:.4f}"


def _costs(entry: Entry) -> tuple[str, ...]:
    steps = f"{entry.steps}{'' if entry.converged else ' (limit)'}" if entry.steps else "–"
    return duration(entry.seconds), steps, f"{entry.numbers:,}", f"{quantity(entry.bytes)}B"


def _skipped(study: Study) -> str:
    items = "".join(
        f"<li><code>{escape(name)}</code>: {escape(reason)}</li>"
        for name, reason in study.skipped.items()
    )
    return f"<h2>Layers without a comparison</h2><ul>{items}</ul>" if items else ""


_DRAWN = (
    ", at the labels that were drawn: a noisy estimate of the Fisher itself, which all estimates "
    "were fitted to. How far they are from that itself is estimated from two more draws of every "
    "label, which no estimate has seen, and stands under “to the Fisher itself”"
)


def _method(study: Study) -> str:
    return (
        "<h2>How it was measured</h2>"
        "<p class='soft'>F is the mean Fisher information of the samples for the layer’s weights "
        f"and bias{_DRAWN if study.drawn else ''}. Errors are estimated without forming F, from "
        "its products with Gaussian probes, which all estimators share: differences between them "
        "are surer than the standard errors say. A standard error of 0 means that the error is "
        "exact, but for rounding.</p>"
        "<p class='soft'>The time is that of one whole fit, without probes, model included, after "
        "a warm-up on the first batch: the fastest of five where fits are short, one where they "
        "are long; by layer, it is what was spent on that layer’s block, the forward and backward "
        "pass apart. Small differences mean little. "
        "“Numbers kept” is what the result holds, not the memory of the fit. A layer whose block "
        "an estimator treats in another way than the rest (normalisation layers, say, have their "
        "exact block) says so under “structure”.</p>"
    )
