"""The comparison in the terminal."""

from __future__ import annotations

from collections.abc import Callable

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from kfoc.compare.measure import Entry, Study
from kfoc.compare.words import duration, measured, quantity


def show(study: Study, console: Console) -> None:
    """Print the errors by layer, and the costs."""
    drawn = ", against F of the drawn labels" if study.drawn else ""
    console.print(_by_layer(study, f"Relative error{drawn} ± standard error", _error, True))
    if study.drawn:
        title = "Relative error, against the Fisher itself ± standard error"
        console.print(_by_layer(study, title, _fisher_error))
    time = "Time by layer, for its block alone"
    console.print(_by_layer(study, time, lambda entry: duration(entry.seconds)))
    console.print(_costs(study))
    for name, reason in study.skipped.items():
        console.print(f"[dim]Without a comparison:[/dim] {escape(f'{name}: {reason}')}")


def _error(entry: Entry) -> str:
    return measured(entry.error, entry.standard_error)


def _fisher_error(entry: Entry) -> str:
    return measured(entry.fisher_error, entry.fisher_error_std)


def _by_layer(
    study: Study, title: str, cell: Callable[[Entry], str], mark_closest: bool = False
) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    # Four estimators and a short name fit 80 columns; longer names are folded.
    table.add_column("layer", overflow="fold", min_width=10)
    for label in study.labels.values():
        table.add_column(escape(label), justify="right")
    for layer in study.layers:
        shown = {name: cell(entry) for name, entry in layer.entries.items()}
        if mark_closest:
            best = study.closest(layer)
            shown[best] = f"[bold]{shown[best]}[/bold]"
        table.add_row(escape(layer.name) or "(the model)", *shown.values())
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
