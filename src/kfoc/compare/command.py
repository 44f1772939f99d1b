"""``kfoc compare``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from kfoc.compare.factory import CompareError, Subject, load
from kfoc.compare.measure import DEFAULT, ESTIMATORS, Options, Study, measure
from kfoc.compare.table import show

INTERRUPTED = 130
console = Console()


def compare(
    target: Annotated[
        str,
        typer.Argument(
            metavar="MODULE:FACTORY",
            help="A function without arguments that returns (model, data) or (model, data, dict of"
            " arguments of kfoc.fit); MODULE is importable, or a .py file.",
        ),
    ],
    out: Annotated[Path, typer.Option(help="The HTML report.")] = Path("report.html"),
    json_file: Annotated[
        Path | None, typer.Option("--json", help="The numbers, as JSON too.")
    ] = None,
    estimators: Annotated[
        str, typer.Option(help=f"Some of {', '.join(ESTIMATORS)}, with commas between.")
    ] = ",".join(DEFAULT),
    likelihood: Annotated[
        str | None, typer.Option(help="categorical, gaussian or bernoulli.")
    ] = None,
    fisher: Annotated[str | None, typer.Option(help="mc, mc-plain, exact or empirical.")] = None,
    mc_samples: Annotated[
        int | None, typer.Option(help="Draws a sample, for mc and mc-plain.")
    ] = None,
    layers: Annotated[
        str | None, typer.Option(help="Names or patterns of layers, with commas between.")
    ] = None,
    probes: Annotated[int, typer.Option(min=1, help="Gaussian probes, for the errors.")] = 16,
    batches: Annotated[
        int | None, typer.Option(min=1, help="The first so many batches alone, kept in memory.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Of the draws and probes.")] = None,
    curves: Annotated[
        bool, typer.Option(help="Fit parts of the data too, for curves of convergence.")
    ] = True,
) -> None:
    """Every estimator on your own model and data: error by layer, and cost.

    Prints a table, and writes a report that opens in any browser, without a network. Options
    override what the factory returns. The model comes back as it was.
    """
    given = {
        "likelihood": likelihood,
        "fisher": fisher,
        "mc_samples": mc_samples,
        "layers": _split(layers) if layers else None,
        "seed": seed,
    }
    options = Options(tuple(_split(estimators)), probes, batches, curves)
    try:
        _check_places(out, json_file)
        study = _measured(target, given, options)
        # Imported late: matplotlib takes half a second to import, which --help need not wait for.
        from kfoc.compare.report import page

        out.write_text(page(study), encoding="utf-8")
        if json_file is not None:
            json_file.write_text(json.dumps(study.to_json(), indent=1) + "\n", encoding="utf-8")
    except (ValueError, OSError) as error:
        Console(stderr=True).print(f"[red]Error:[/red] {escape(str(error))}", soft_wrap=True)
        raise typer.Exit(2) from None
    except KeyboardInterrupt:
        console.print("Interrupted; nothing is written.")
        raise typer.Exit(INTERRUPTED) from None
    show(study, console)
    written = [str(path) for path in (out, json_file) if path is not None]
    console.print("Written:", escape(", ".join(written)), soft_wrap=True)


def _measured(target: str, given: dict[str, Any], options: Options) -> Study:
    with console.status("the model and the data") as status:
        subject = load(target)
        arguments = subject.arguments | {k: v for k, v in given.items() if v is not None}
        subject = Subject(subject.model, subject.data, arguments)
        return measure(subject, options, target, lambda text: status.update(escape(text)))


def _split(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _check_places(*paths: Path | None) -> None:
    """Before the fits, not after them."""
    for path in paths:
        if path is None:
            continue
        if path.is_dir():
            raise CompareError(f"{path} is a folder: give the name of a file")
        if not path.absolute().parent.is_dir():
            raise CompareError(f"there is no folder {path.absolute().parent} to write {path.name}")
