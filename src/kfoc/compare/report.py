"""The comparison as one HTML file that needs nothing beside itself."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable
from html import escape

from kfoc.compare.charts import Bar, Line, bars, lines
from kfoc.compare.measure import ESTIMATORS, Entry, Layer, Study
from kfoc.compare.pictures import Heatmap
from kfoc.compare.style import sheet
from kfoc.compare.words import duration, quantity

# So many layers are shown unfolded.
UNFOLDED = 3


def page(study: Study) -> str:
    """The report."""
    title = f"Curvature estimators on {study.title}"
    body = [
        "<h1>Curvature estimators compared</h1>",
        f"<p class='soft'>On <code>{escape(study.title)}</code>: how far each estimate of the "
        "Fisher information is from the exact block, layer by layer, and what it costs.</p>",
        _settings(study),
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


def _settings(study: Study) -> str:
    pairs = "".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>"
        for name, value in study.settings.items()
    )
    return f"<dl>{pairs}</dl>"


def _legend(study: Study, names: Iterable[str]) -> str:
    items = "".join(
        f'<li><span class="swatch {name}"></span>{escape(study.labels[name])}</li>'
        for name in names
    )
    return f'<ul class="legend">{items}</ul>'


def _overview(study: Study) -> str:
    base = study.seconds.get("kfac")
    rows = []
    for name, label in study.labels.items():
        errors = [layer.entries[name].error for layer in study.layers]
        closest = sum(study.closest(layer) == name for layer in study.layers)
        ratio = f"{study.seconds[name] / base:.2f}" if base else "–"
        cells = (
            f"{statistics.median(errors):.3f}" if errors else "–",
            f"{min(errors):.3f} – {max(errors):.3f}" if errors else "–",
            f"{closest} of {len(errors)}",
            duration(study.seconds[name]),
            ratio,
            quantity(study.numbers(name)),
        )
        rows.append(
            f'<tr><th scope="row"><span class="swatch {name}"></span>{escape(label)}</th>'
            f"{''.join(f'<td>{cell}</td>' for cell in cells)}"
            "</tr>"
        )
    meanings = "; ".join(
        f"{escape(label)}: {escape(ESTIMATORS[name].meaning)}"
        for name, label in study.labels.items()
    )
    heads = (
        "median error",
        "range over layers",
        "closest at layers",
        "time of the fit",
        "÷ K-FAC",
        "numbers kept",
    )
    return (
        "<h2>Estimators</h2>"
        '<div class="scroll" tabindex="0" role="region" aria-label="Estimators"><table>'
        '<thead><tr><th scope="col">estimator</th>'
        f"{''.join(f'<th scope=col>{head}</th>' for head in heads)}</tr></thead>"
        f"<tbody>{''.join(rows)}</tbody></table></div><p class='soft note'>{meanings}.</p>"
    )


def _limit(study: Study) -> float:
    """The end of the bars' scale, the same at every layer; an error can exceed 1."""
    errors = [entry.error for layer in study.layers for entry in layer.entries.values()]
    largest = max(errors, default=1.0)
    # One hopeless estimate must not make all others' bars invisible: its number says it all.
    return min(max(1.0, largest), 2.0)


def _errors(study: Study) -> str:
    limit = _limit(study)
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
    entries = [
        Bar(name, study.labels[name], entry.error, entry.standard_error)
        for name, entry in layer.entries.items()
    ]
    return bars(entries, limit, f"Relative errors of layer {layer.name or '(the model)'}")


def _name(layer: Layer) -> str:
    return f"<code>{escape(layer.name)}</code>" if layer.name else "(the model itself)"


def _shape(layer: Layer) -> str:
    return f"{layer.shape[0]:,} × {layer.shape[1]:,}"


def _layers(study: Study) -> str:
    if not any(
        entry.heatmaps or entry.spectrum
        for layer in study.layers
        for entry in layer.entries.values()
    ):
        return ""
    parts = []
    for number, layer in enumerate(study.layers):
        best = study.closest(layer)
        unfolded = " open" if number < UNFOLDED else ""
        parts.append(
            f"<details{unfolded}><summary><span class='title'>{_name(layer)}</span>"
            f"<span class='soft'>{_shape(layer)}, closest: {escape(study.labels[best])} "
            f"{layer.entries[best].error:.3f}</span></summary>"
            f"<div class='grid-of'>{_curves(study, layer)}{_maps(study, layer)}</div></details>"
        )
    return (
        "<h2>Spectra, convergence and factors</h2>"
        f"{_legend(study, study.labels)}"
        "<p class='soft'>Images of factors: the signed root of each entry over the largest, "
        "<span class='whole'>negative <span class='scale' role='img' "
        "aria-label='from orange over clear to blue'></span> positive</span>; factors of more than "
        f"64 rows or columns by the means of blocks of entries.</p>{''.join(parts)}"
    )


def _curves(study: Study, layer: Layer) -> str:
    charts = []
    spectra = [
        Line(name, study.labels[name], entry.spectrum.rank, entry.spectrum.value)
        for name, entry in layer.entries.items()
        if entry.spectrum
    ]
    if spectra:
        chart = lines(spectra, "rank", "eigenvalue", "Eigenvalues of the estimates", dots=False)
        charts.append(("Eigenvalues", chart, "Of the estimates of F, those above rounding."))
    if layer.by_step:
        line = Line("kfoc", "K-FOC", *layer.by_step)
        chart = lines([line], "half steps", "1 − σ/σ∞", "Convergence of the power iteration")
        note = (
            f"1 − σ/σ∞ of the plain iteration on the first batch ({study.first_batch:,} samples)."
        )
        charts.append(("Power iteration", chart, note))
    samples = [Line(name, study.labels[name], *curve) for name, curve in layer.by_samples.items()]
    if samples:
        chart = lines(samples, "samples", "relative distance", "Distance to the final estimate")
        note = f"‖estimate − final‖ / ‖final‖; final: all {study.num_samples:,} samples."
        charts.append(("Estimates by samples", chart, note))
    return "".join(
        f"<figure><h4>{head}</h4>{chart}<figcaption>{escape(note)}</figcaption></figure>"
        for head, chart, note in charts
    )


def _maps(study: Study, layer: Layer) -> str:
    figures = [
        _map(study.labels[name], picture)
        for name, entry in layer.entries.items()
        for picture in entry.heatmaps
    ]
    return f"<div class='maps wide'>{''.join(figures)}</div>" if figures else ""


def _map(label: str, picture: Heatmap) -> str:
    rows, columns = picture.shape
    words = f"{label}: {picture.name}, {rows:,} × {columns:,}"
    return (
        f"<figure class='map'><img src='{picture.uri}' alt='{escape(words)}'>"
        f"<figcaption><b>{escape(label)}</b><br>{escape(picture.name)}, "
        f"<span class='whole'>{rows:,} × {columns:,}</span></figcaption></figure>"
    )


def _numbers(study: Study) -> str:
    rows = []
    for layer in study.layers:
        best = study.closest(layer)
        for position, (name, entry) in enumerate(layer.entries.items()):
            head = (
                f'<th scope="rowgroup" rowspan="{len(layer.entries)}" class="name">{_name(layer)}'
                f'<br><span class="soft">{_shape(layer)}</span></th>'
                if not position
                else ""
            )
            bold = " class='best'" if name == best else ""
            rows.append(
                f"<tr>{head}<td class='text'><span class='swatch {name}'></span>"
                f"{escape(study.labels[name])}</td><td{bold}>{_figure(entry.error)}</td>"
                f"<td>{_figure(entry.standard_error)}</td><td>{_figure(entry.fisher_error)}</td>"
                f"<td>{_figure(entry.fisher_error_std)}</td>{_costs(entry)}</tr>"
            )
    errors = ("error", "std. error", "to the Fisher itself", "its std. error")
    heads = ("estimator", *errors, "time", "structure", "numbers", "bytes", "plan")
    text = ("estimator", "structure", "plan")
    columns = "".join(
        f"<th scope='col'{' class=text' if head in text else ''}>{head}</th>"
        for head in (*heads, "half steps")
    )
    return (
        "<h2>All numbers</h2><div class='scroll' tabindex='0' role='region' "
        "aria-label='All numbers'><table><thead><tr><th scope='col'>layer</th>"
        f"{columns}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
    )


def _figure(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:.4f}"


def _costs(entry: Entry) -> str:
    steps = f"{entry.steps}{'' if entry.converged else ' (limit)'}" if entry.steps else "–"
    return (
        f"<td>{duration(entry.seconds)}</td>"
        f"<td class='text'>{escape(entry.structure)}</td><td>{entry.numbers:,}</td>"
        f"<td>{quantity(entry.bytes)}B</td><td class='text'>{escape(entry.plan) or '–'}</td>"
        f"<td>{steps}</td>"
    )


def _skipped(study: Study) -> str:
    if not study.skipped:
        return ""
    items = "".join(
        f"<li><code>{escape(name)}</code>: {escape(reason)}</li>"
        for name, reason in study.skipped.items()
    )
    return f"<h2>Layers without a comparison</h2><ul>{items}</ul>"


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
