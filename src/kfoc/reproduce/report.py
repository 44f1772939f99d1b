"""What is written and printed at the end: runtime.csv, summary.md, and the same in the terminal."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator
from statistics import median

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from kfoc.files.writing import write_text
from kfoc.reproduce.experiment import ESTIMATORS, BatchSize, Record
from kfoc.reproduce.results import markdown
from kfoc.reproduce.store import Store
from kfoc.reproduce.summary import NAMES, Key, Stat, Summary, claims, summarise

RUNTIME = "dataset,method,batch_size,median_seconds,min_seconds,max_seconds,ratio_to_kfac,seeds"


def report(store: Store, console: Console) -> list[Summary]:
    """Write runtime.csv and summary.md, and print the summary."""
    summaries = summarise(store.records, store.settings)
    write_text(store.folder / "runtime.csv", runtime_csv(store.records))
    write_text(store.folder / "summary.md", page(summaries))
    for summary in summaries:
        _print(summary, console)
    return summaries


def runtime_csv(records: list[Record]) -> str:
    """Seconds of one fit, over seeds; ratio_to_kfac is of medians at the same batch size."""
    seconds: dict[tuple[str, str, BatchSize], dict[int, float]] = defaultdict(dict)
    for r in records:
        # The layers of one fit share its seconds.
        seconds[r["dataset"], r["method"], r["batch_size"]][r["seed"]] = r["seconds"]
    lines = [RUNTIME]
    for (dataset, method, size), by_seed in seconds.items():
        times = list(by_seed.values())
        kfac = seconds.get((dataset, "kfac", size))
        ratio = f"{median(times) / median(kfac.values()):.3f}" if kfac else ""
        figures = [f"{t:.6f}" for t in (median(times), min(times), max(times))]
        lines.append(",".join([dataset, method, str(size), *figures, ratio, str(len(times))]))
    return "\n".join(lines) + "\n"


def page(summaries: list[Summary]) -> str:
    """The tables and the claims."""
    parts = ["# Relative errors against the exact block", ""]
    parts += ["Mean [min, max] over seeds; the paper's values were read off its figures.", ""]
    for summary in summaries:
        parts += [f"## {summary.title}", ""]
        for layer in summary.layers:
            header = [f"{layer}, batch size", *map(str, summary.batch_sizes)]
            parts += [markdown(header, _rows(summary, layer)), ""]
            parts += [f"{summary.of_draws(layer)}.", ""]
        parts += ["### Claims", ""]
        for claim in claims(summary):
            parts.append(f"- **{claim.verdict}**: {claim.text}")
            parts += [f"  - {exception}" for exception in claim.exceptions]
        parts.append("")
    return "\n".join(parts)


def _rows(summary: Summary, layer: str) -> Iterator[list[str]]:
    """A method's errors by batch size, the paper's below them."""
    for method in ESTIMATORS:
        keys = [Key(layer, method, size) for size in summary.batch_sizes]
        yield [NAMES[method], *(str(summary.errors[key]) for key in keys)]
        papers = [_paper(summary.paper.get(key)) for key in keys]
        if any(papers):
            yield [f"{NAMES[method]}, paper", *papers]
    optimum = str(summary.optimum(layer))
    yield ["optimum of the whole set", *[optimum] * len(summary.batch_sizes)]


def _paper(stat: Stat | None) -> str:
    if stat is None:
        return ""
    # Three decimals only where the paper's figure was read so finely.
    mean, low, high = (f"{value:.3f}".removesuffix("0") for value in stat)
    return mean if stat.low == stat.high else f"{mean} [{low}, {high}]"


def _print(summary: Summary, console: Console) -> None:
    console.print(escape(summary.title), style="bold", soft_wrap=True)
    for layer in summary.layers:
        sizes = map(str, summary.batch_sizes)
        table = Table(layer.capitalize(), *sizes, box=box.SIMPLE_HEAD)
        for name, *cells in _rows(summary, layer):
            style = "dim" if name.endswith("paper") else None
            # The range below the mean, as a terminal is narrow.
            narrow = (re.sub(r" \[(.*), (.*)\]", r"\n\1-\2", cell) for cell in cells)
            table.add_row(name, *narrow, style=style)
        console.print(table)
        console.print(summary.of_draws(layer), highlight=False)
    for claim in claims(summary):
        style = "red" if claim.exceptions else "green"
        console.print(f"[{style}]{claim.verdict}[/{style}]: {escape(claim.text)}", highlight=False)
        for exception in claim.exceptions:
            console.print(f"  - {escape(exception)}", highlight=False)
    console.print()
