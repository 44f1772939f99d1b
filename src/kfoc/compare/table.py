"""The comparison in the terminal."""

from __future__ import annotations

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from kfoc.compare.measure import Study
from kfoc.compare.words import duration, measured, quantity


def show(study: Study, console: Console) -> None:
    """Print the errors by layer, and the costs."""
    console.print(_errors(study))
    console.print(_times(study))
    console.print(_costs(study))
    for name, reason in study.skipped.items():
        console.print(f"[dim]Without a comparison:[/dim] {escape(f'{name}: {reason}')}")


def _errors(study: Study) -> Table:
    table = Table(
        title="Relative error ± standard error", title_justify="left", box=box.SIMPLE_HEAD
    )
    # Four estimators and a short name fit 80 columns; longer names are folded.
    table.add_column("layer", overflow="fold", min_width=10)
    for label in study.labels.values():
        table.add_column(escape(label), justify="right")
    for layer in study.layers:
        best = study.closest(layer)
        shown = {name: measured(e.error, e.standard_error) for name, e in layer.entries.items()}
        shown[best] = f"[bold]{shown[best]}[/bold]"
        name = escape(layer.name) or "(the model)"
        table.add_row(name, *shown.values())
    return table


def _times(study: Study) -> Table:
    title = "Time by layer, for its block alone"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("layer", overflow="fold", min_width=10)
    for label in study.labels.values():
        table.add_column(escape(label), justify="right")
    for layer in study.layers:
        times = (duration(entry.seconds) for entry in layer.entries.values())
        table.add_row(escape(layer.name) or "(the model)", *times)
    return table


def _costs(study: Study) -> Table:
    table = Table(
        title="Cost of a fit, all layers and the model", title_justify="left", box=box.SIMPLE_HEAD
    )
    table.add_column("estimator")
    for head in ("time", "/ K-FAC", "numbers kept", "closest at layers"):
        table.add_column(head, justify="right")
    base = study.seconds.get("kfac")
    for name, label in study.labels.items():
        closest = sum(study.closest(layer) == name for layer in study.layers)
        table.add_row(
            escape(label),
            duration(study.seconds[name]),
            f"{study.seconds[name] / base:.2f}" if base else "-",
            quantity(study.numbers(name)).strip(),
            f"{closest} of {len(study.layers)}",
        )
    return table
