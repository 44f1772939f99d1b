"""The command line: ``kfoc reproduce``, and ``kfoc compare`` of `kfoc.compare`."""

from __future__ import annotations

import enum
import importlib.util
from pathlib import Path
from typing import Annotated

import torch

try:
    import typer
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
except ImportError as error:
    raise SystemExit(
        f"the command line needs {error.name}, which is not installed:"
        ' pip install "kfoc[reproduce]"'
    ) from None

import kfoc
from kfoc.compare.command import compare
from kfoc.reproduce import data
from kfoc.reproduce.experiment import Experiment, convolutional, fully_connected, run_seed
from kfoc.reproduce.store import Store

SEEDS = 10
# What --quick does instead: the same networks, fewer seeds, the curvature of fewer digits.
QUICK_SEEDS = 2
QUICK_DIGITS = 1000
INTERRUPTED = 130

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
console = Console()


class Name(str, enum.Enum):
    fully_connected = "fully_connected"
    convolutional = "convolutional"


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"kfoc {kfoc.__version__}, torch {torch.__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_version, is_eager=True, help="kfoc's, and torch's."),
    ] = False,
) -> None:
    """Kronecker-factored optimal curvature."""


app.command()(compare)


@app.command()
def reproduce(
    seeds: Annotated[
        int | None,
        typer.Option(min=1, help=f"How many seeds; {SEEDS} if not given, {QUICK_SEEDS} if quick."),
    ] = None,
    quick: Annotated[
        bool,
        typer.Option(
            "--quick", help=f"Two minutes: fewer seeds, the curvature of {QUICK_DIGITS:,} digits."
        ),
    ] = False,
    out: Annotated[Path, typer.Option(help="Folder for the results.")] = Path("results"),
    csv: Annotated[
        Path | None,
        typer.Option(help="Your own table of numbers, with a header, in place of Boston Housing."),
    ] = None,
    target: Annotated[str | None, typer.Option(help="The column of --csv to predict.")] = None,
    mnist: Annotated[
        Path | None,
        typer.Option(help="Folder of MNIST's idx files, in place of the 5,000 digits."),
    ] = None,
    only: Annotated[Name | None, typer.Option(help="One of the two experiments.")] = None,
    threads: Annotated[
        int, typer.Option(min=1, help="Threads: times are of so many, and results kept apart.")
    ] = 1,
) -> None:
    """The paper's experiment: relative errors and run times of every method, as data and figures.

    With --csv or --mnist, only the experiments on these.

    Ctrl-C keeps what is finished; the same command goes on from there.
    """
    count = seeds or (QUICK_SEEDS if quick else SEEDS)
    try:
        if importlib.util.find_spec("matplotlib") is None:  # before the long run, not after it
            raise data.DataError(f"the figures need matplotlib: {data.INSTALL}")
        experiments = _experiments(quick, csv, target, mnist, only)
        store = Store(out, {e.name: e.settings() | {"threads": threads} for e in experiments})
    except data.DataError as error:
        Console(stderr=True).print(f"[red]Error:[/red] {escape(str(error))}", soft_wrap=True)
        raise typer.Exit(2) from None
    # One by default: batches of one sample gain nothing from more, and their times less noise.
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for experiment in experiments:
            _run(experiment, count, store)
        _finish(store)
    except KeyboardInterrupt:
        units = {unit for experiment in experiments for unit in experiment.units(count)}
        console.print(
            f"Interrupted. {len(units & store.done())} of {len(units)} fits are finished and kept"
            f" in {escape(str(store.path))}; the same command goes on from there.",
            soft_wrap=True,
        )
        raise typer.Exit(INTERRUPTED) from None
    finally:
        torch.set_num_threads(before)


def _experiments(
    quick: bool, csv: Path | None, target: str | None, mnist: Path | None, only: Name | None
) -> list[Experiment]:
    if (csv is None) != (target is None):
        raise data.DataError("--csv FILE and --target COLUMN, the column to predict, go together")
    given = {Name.fully_connected: csv, Name.convolutional: mnist}
    chosen = {name for name, path in given.items() if path is not None} or set(Name)
    if only is not None and only not in chosen:
        raise data.DataError(
            f"--only {only.value} leaves nothing to do with the data that --csv or --mnist gives"
        )
    chosen = chosen if only is None else {only}
    experiments = []
    if Name.fully_connected in chosen:
        table = data.boston() if csv is None else data.read_csv(csv, target or "")
        experiments.append(fully_connected(table, comparable=csv is None))
    if Name.convolutional in chosen:
        images = data.digits() if mnist is None else data.read_idx_directory(mnist)
        experiments.append(convolutional(images, QUICK_DIGITS if quick else None))
    return experiments


def _run(experiment: Experiment, seeds: int, store: Store) -> None:
    units, done = experiment.units(seeds), store.done()
    columns = BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, TextColumn("{task.description}"), console=console) as progress:
        finished = len(done.intersection(units))
        task = progress.add_task(experiment.name, total=len(units), completed=finished)

        def say(text: str) -> None:
            progress.update(task, description=f"{experiment.name}, {text}")

        for seed in range(seeds):
            pending = [unit for unit in units if unit.seed == seed and unit not in done]
            # A finished seed's network need not be trained again.
            for records in run_seed(experiment, seed, pending, say) if pending else ():
                store.add(records)
                progress.advance(task)
        progress.update(task, description=f"{experiment.name}, done")


def _finish(store: Store) -> None:
    # Imported late: drawing takes half a second to import, which --help need not wait for.
    from kfoc.reproduce.figures import draw
    from kfoc.reproduce.report import report

    summaries = report(store, console)
    written = [store.folder / name for name in ("results.json", "runtime.csv", "summary.md")]
    for summary in summaries:
        written += draw(summary, store.folder)
    console.print("Written:", ", ".join(escape(str(path)) for path in written), soft_wrap=True)
