"""What is written and printed at the end: runtime.csv, summary.md, and the same in the terminal."""

from __future__ import annotations

import csv
import io
from collections import defaultdict
from collections.abc import Iterator
from statistics import median

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from kfoc.files.writing import write_text
from kfoc.reproduce.experiment import ESTIMATORS, BatchSize, Record
from kfoc.reproduce.store import Store
from kfoc.reproduce.summary import NAMES, Claim, Key, Stat, Summary, claims, summarise

RUNTIME_COLUMNS = (
    "dataset",
    "method",
    "batch_size",
    "median_seconds",
    "min_seconds",
    "max_seconds",
    "ratio_to_kfac",
    "seeds",
)


def report(store: Store, console: Console) -> list[Summary]:
    """Write runtime.csv and summary.md, and print the summary."""
    summaries = summarise(store.records, store.settings)
    write_text(store.folder / "runtime.csv", runtime_csv(store.records))
    write_text(store.folder / "summary.md", markdown(summaries))
    for summary in summaries:
        _print(summary, console)
    return summaries


# --- Run times ----------------------------------------------------------------------------------


def runtime_csv(records: list[Record]) -> str:
    """Seconds of one fit, over seeds; ratio_to_kfac is of medians at the same batch size."""
    seconds: dict[tuple[str, str, BatchSize], dict[int, float]] = defaultdict(dict)
    for r in records:
        # The layers of one fit share its seconds.
        seconds[r["dataset"], r["method"], r["batch_size"]][r["seed"]] = r["seconds"]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(RUNTIME_COLUMNS)
    for (dataset, method, size), by_seed in seconds.items():
        times = list(by_seed.values())
        kfac = seconds.get((dataset, "kfac", size))
        ratio = f"{median(times) / median(kfac.values()):.3f}" if kfac else ""
        figures = [f"{t:.6f}" for t in (median(times), min(times), max(times))]
        writer.writerow([dataset, method, size, *figures, ratio, len(times)])
    return text.getvalue()


# --- Tables -------------------------------------------------------------------------------------


def title(summary: Summary) -> str:
    name = summary.name.replace("_", " ").capitalize()
    seeds = f"{summary.num_seeds} seed{'s' if summary.num_seeds > 1 else ''}"
    return f"{name}: {summary.settings['curvature of']}, {seeds}"


def markdown(summaries: list[Summary]) -> str:
    """The tables and the claims."""
    parts = ["# Relative errors against the exact block", ""]
    parts += ["Mean [min, max] over seeds; the paper's values were read off its figures.", ""]
    for summary in summaries:
        parts += [f"## {title(summary)}", ""]
        for layer in summary.layers:
            parts += [*_markdown_table(summary, layer), "", f"{summary.of_draws(layer)}.", ""]
        parts += ["### Claims", ""]
        for claim in claims(summary):
            parts.append(f"- **{_verdict(claim)}**: {claim.text}")
            parts += [f"  - {exception}" for exception in claim.exceptions]
        parts.append("")
    return "\n".join(parts)


def _markdown_table(summary: Summary, layer: str) -> Iterator[str]:
    sizes = summary.batch_sizes
    yield f"| {layer}, batch size | {' | '.join(map(str, sizes))} |"
    yield f"|---|{'---|' * len(sizes)}"
    for method in ESTIMATORS:
        cells = [str(summary.errors[Key(layer, method, size)]) for size in sizes]
        yield f"| {NAMES[method]} | {' | '.join(cells)} |"
        papers = [_paper(summary.paper.get(Key(layer, method, size))) for size in sizes]
        if any(papers):
            yield f"| {NAMES[method]}, paper | {' | '.join(papers)} |"
    optimum = [str(summary.optimum(layer))] * len(sizes)
    yield f"| optimum of the whole set | {' | '.join(optimum)} |"


def _paper(stat: Stat | None) -> str:
    if stat is None:
        return ""
    # Three decimals only where the paper's figure was read so finely.
    mean, low, high = (f"{value:.3f}".removesuffix("0") for value in stat)
    return mean if stat.low == stat.high else f"{mean} [{low}, {high}]"


def _verdict(claim: Claim) -> str:
    return "holds" if claim.holds else "does not hold"


def _print(summary: Summary, console: Console) -> None:
    console.print(escape(title(summary)), style="bold", soft_wrap=True)
    for layer in summary.layers:
        console.print(_table(summary, layer))
        console.print(summary.of_draws(layer), highlight=False)
    for claim in claims(summary):
        style = "green" if claim.holds else "red"
        console.print(
            f"[{style}]{_verdict(claim)}[/{style}]: {escape(claim.text)}", highlight=False
        )
        for exception in claim.exceptions:
            console.print(f"  - {escape(exception)}", highlight=False)
    console.print()


def _table(summary: Summary, layer: str) -> Table:
    """One row a method; a cell has the mean, the range, and the paper's mean below it."""
    table = Table(layer.capitalize(), *map(str, summary.batch_sizes), show_lines=True)
    for method in ESTIMATORS:
        keys = [Key(layer, method, size) for size in summary.batch_sizes]
        papers = [summary.paper.get(key) for key in keys]
        labels = [NAMES[method], "[dim]min to max[/dim]"]
        labels += ["[dim]paper[/dim]"] if any(papers) else []
        cells = [_cell(summary.errors[key], paper) for key, paper in zip(keys, papers, strict=True)]
        table.add_row("\n".join(labels), *cells)
    table.add_row("optimum", *[f"{summary.optimum(layer).mean:.3f}"] * len(summary.batch_sizes))
    return table


def _cell(stat: Stat, paper: Stat | None) -> str:
    lines = [f"{stat.mean:.3f}", f"[dim]{stat.low:.3f}-{stat.high:.3f}[/dim]"]
    if paper is not None:
        lines.append(f"[dim]{_paper(paper).split(' ')[0]}[/dim]")
    return "\n".join(lines)
