"""The comparison in the terminal; and of each estimator over all layers, as the report has it."""

from __future__ import annotations

import statistics
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
    if any(study.stand_in(name, layer) for layer in study.layers for name in layer.entries):
        console.print(
            f"[dim]{STAND_IN} a diagonal: no factors, and too large for a dense block[/dim]"
        )
    costs = _table("Each estimator, over all layers", "estimator")
    narrow = [k for k, head in enumerate(OVERVIEW) if head != "range over layers"]
    for k in narrow:
        costs.add_column(OVERVIEW[k], justify="right")
    for name, cells in overview(study).items():
        costs.add_row(escape(study.labels[name]), *(cells[k] for k in narrow))
    console.print(costs)
    for name, reason in study.skipped.items():
        console.print(f"[dim]Without a comparison:[/dim] {escape(f'{name}: {reason}')}")


# Behind the number of an estimator that has a diagonal in a layer.
STAND_IN = "◇"

OVERVIEW = (
    *("median error", "range over layers", "closest at layers"),
    *("time of the fit", "÷ K-FAC", "numbers kept"),
)


def overview(study: Study) -> dict[str, tuple[str, ...]]:
    """Of each estimator, what `OVERVIEW` names."""
    base = study.seconds.get("kfac")
    found: dict[str, tuple[str, ...]] = {}
    for name in study.labels:
        errors = [layer.entries[name].error for layer in study.layers]
        best = [study.closest(layer) for layer in study.layers]
        alone, tied = sum(b == (name,) for b in best), sum(name in b for b in best)
        ties = f", {tied - alone} tied" if tied > alone else ""
        found[name] = (
            f"{statistics.median(errors):.3f}" if errors else "–",
            f"{min(errors):.3f} – {max(errors):.3f}" if errors else "–",
            f"{alone} of {len(errors)}{ties}",
            duration(study.seconds[name]),
            f"{study.seconds[name] / base:.2f}" if base else "–",
            quantity(study.numbers(name)).strip(),
        )
    return found


def _error(entry: Entry) -> str:
    return measured(entry.error, entry.standard_error)


def _fisher_error(entry: Entry) -> str:
    return measured(entry.fisher_error, entry.fisher_error_std)


def _by_layer(
    study: Study, title: str, cell: Callable[[Entry], str], marked: bool = False
) -> Table:
    table = _table(title, "layer")
    for label in study.labels.values():
        table.add_column(escape(label), justify="right")
    for layer in study.layers:
        shown = {name: cell(entry) for name, entry in layer.entries.items()}
        if marked:
            for best in study.closest(layer):
                shown[best] = f"[bold]{shown[best]}[/bold]"
            shown |= {
                name: f"{text} {STAND_IN}"
                for name, text in shown.items()
                if study.stand_in(name, layer)
            }
        table.add_row(escape(layer.name) or "(the model)", *shown.values())
    return table


def _table(title: str, first: str) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    # Four estimators and a short name fit 80 columns; longer names are folded.
    table.add_column(first, overflow="fold", min_width=10)
    return table
