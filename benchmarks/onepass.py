"""How far estimators of one pass end from the optimum, on streams that are hard for them.

    python benchmarks/onepass.py [--quick] [--out results/onepass.json] [--label now]
    python benchmarks/onepass.py --beside benchmarks/results/onepass.json
    python benchmarks/onepass.py --only "rank 2" "rank 3" --ranks 1

Three networks trained nearly to the end, streams in order and sorted by class, batches of 1 to 10,
with a buffer of about 6 batches and without, in one process and over 2 and 4 ranks (gloo, all on
this machine). The excess of the relative error over that of the best product, or the best sum of r,
by dense algebra (tests/hard_streams.py, tests/oracle.py) that shares no code with the library.
Sums of products a sample at a time have one seed, all others three. Smaller heads than that of
`KFOC()` are measured on one stream, which is hard for them: batches of 8, sorted, without a buffer.

Writes the JSON after every row, and a table beside it as `.md`. `--beside` puts the columns of an
earlier file, which may be the one that is written, before those of this run. `--only` and `--ranks`
measure some rows of the file that is written, and leave its others as they are.
"""

from __future__ import annotations

import argparse
import itertools
import platform
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "tests")]

from hard_streams import BUFFERED, NETWORKS, NOISE, STEPS, Case, mean  # noqa: E402
from kfoc.reproduce.results import markdown, read, write  # noqa: E402
from onepass_worker import over_ranks  # noqa: E402

ESTIMATORS = ("online", "head 2", "head 1", "head 0", "running", "rank 2", "rank 3")
SEVERAL = ("online", "rank 2")  # those that are measured over ranks
NAMES = {
    "online": "`KFOC()`",
    "head 2": "`KFOC(head=2)`",
    "head 1": "`KFOC(head=1)`",
    "head 0": "`KFOC(head=0)`",
    "running": '`KFOC("running")`',
    "rank 2": "`KFOC(rank=2)`",
    "rank 3": "`KFOC(rank=3)`",
}
SAMPLES, SEEDS, BATCHES = 480, (0, 1, 2), (1, 3, 8, 10)
ORDERS = ("in order", "sorted")
SHARDS = (("in order", "even"), ("in order", "uneven"), ("sorted", "uneven"), ("sorted", "sorted"))
SMALL_HEADS = ("sorted", 8, False)  # the stream that they are measured on
LIMIT = 3600.0  # seconds for all cases of one number of ranks

Row = dict[str, Any]


def settings(quick: bool) -> dict[str, Any]:
    return {
        "samples": 120 if quick else SAMPLES,
        "seeds": [0] if quick else list(SEEDS),
        "batches": [10] if quick else list(BATCHES),
        "worlds": [1, 2] if quick else [1, 2, 4],
        "steps of Adam": STEPS,
        "noise by seed": NOISE,
        "batches in a buffer": BUFFERED,
        "torch": torch.__version__,
        "machine": platform.machine(),
    }


def key(row: Row) -> str:
    """What a row is about, and what it is found by in other files."""
    parts = ("estimator", "network", "order", "batch", "buffer", "ranks", "shards")
    return ", ".join(f"{part} {row[part]}" for part in parts)


def described(case: Case, world: int) -> Row:
    return {
        "estimator": case.estimator,
        "network": case.network,
        "order": case.order,
        "batch": case.batch,
        "buffer": case.buffered,
        "ranks": world,
        "shards": case.shards,
    }


def summed_up(case: Case, world: int, excesses: list[float]) -> Row:
    numbers = {"mean": mean(excesses), "largest": max(excesses), "blocks": len(excesses)}
    return described(case, world) | numbers


def alone(chosen: dict[str, Any], estimators: Sequence[str]) -> Iterator[Row]:
    """Rows of fits in this process."""
    for estimator, network, order, batch, buffered in itertools.product(
        estimators, NETWORKS, ORDERS, chosen["batches"], (False, True)
    ):
        if estimator == "running" and buffered:
            continue  # it has no use for one
        if estimator.startswith("head") and (order, batch, buffered) != SMALL_HEADS:
            continue
        found: list[float] = []
        slow = batch == 1 and estimator in ("rank 2", "rank 3")
        for seed in chosen["seeds"][: 1 if slow else None]:
            case = Case(network, seed, chosen["samples"], order, batch, buffered, estimator)
            found += case.excesses()
        yield summed_up(case, 1, found)


def shared(chosen: dict[str, Any], estimators: Sequence[str], world: int) -> Iterator[Row]:
    """Rows of fits over ranks, all in the same processes."""
    rows = [
        [
            Case(network, seed, chosen["samples"], order, 8, buffered, estimator, shards)
            for seed in chosen["seeds"]
        ]
        for estimator, network, (order, shards), buffered in itertools.product(
            [e for e in SEVERAL if e in estimators], NETWORKS, SHARDS, (False, True)
        )
    ]
    found = iter(over_ranks([case for row in rows for case in row], world, LIMIT))
    for row in rows:
        excesses = [e for _ in row for e in next(found)]
        yield summed_up(row[0], world, excesses)


def table(content: dict[str, Any]) -> str:
    """Markdown: by estimator, one table of one process and one of several."""
    columns = content["columns"]
    labels = list(columns)
    keyed = {label: {key(row): row for row in rows} for label, rows in columns.items()}
    every = {key(row): row for rows in columns.values() for row in rows}
    out = [
        "Excess of the relative error over the optimum: mean (largest) over the layers and seeds.",
        f"{content['settings']['samples']} samples, seeds {content['settings']['seeds']}. "
        "Targets: .0050 (.0200). Made by `benchmarks/onepass.py`.",
        "",
    ]
    heads = ("estimator", "ranks", *(f"{label}: worst mean (largest)" for label in labels))
    lines: list[tuple[str, ...]] = []
    for estimator, several in itertools.product(ESTIMATORS, (False, True)):
        chosen = [k for k, row in every.items() if kind(row) == (estimator, several)]
        if chosen:
            cells = [worst([rows[k] for k in chosen if k in rows]) for rows in keyed.values()]
            lines.append((NAMES[estimator], "2 and 4" if several else "one process", *cells))
    out.append(markdown(heads, lines, range(len(heads))))
    for estimator, several in itertools.product(ESTIMATORS, (False, True)):
        chosen = [k for k, row in every.items() if kind(row) == (estimator, several)]
        if not chosen:
            continue
        title = f"{NAMES[estimator]}, {'over ranks' if several else 'in one process'}"
        inside = ("ranks", "shards") if several else ("batch",)
        heads, lines = ("network", "order", *inside, "buffer", *labels), []
        for k in chosen:
            row = every[k]
            middle = (row["ranks"], row["shards"]) if several else (row["batch"],)
            first = (row["network"], row["order"], *middle, "yes" if row["buffer"] else "no")
            lines.append((*map(str, first), *(shown(rows.get(k)) for rows in keyed.values())))
        out += ["", f"## {title}", "", markdown(heads, lines, range(len(heads)))]
    return "\n".join(out) + "\n"


def kind(row: Row) -> tuple[str, bool]:
    return row["estimator"], row["ranks"] > 1


def worst(rows: list[Row]) -> str:
    if not rows:
        return "-"
    return shown({name: max(row[name] for row in rows) for name in ("mean", "largest")})


def shown(row: Row | None) -> str:
    if row is None:
        return "-"
    # Rounding can leave what is none slightly negative.
    mean_, largest = (f"{max(row[name], 0):.4f}".removeprefix("0") for name in ("mean", "largest"))
    return f"{mean_} ({largest})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    results = Path(__file__).parent / "results"
    parser.add_argument("--quick", action="store_true", help="one seed and batch size, 120 samples")
    parser.add_argument("--out", type=Path, help="results/onepass.json; --quick: onepass-quick")
    parser.add_argument("--label", default="now", help="of this run's column")
    parser.add_argument("--beside", type=Path, help="an earlier file, whose columns come first")
    parser.add_argument("--only", nargs="+", choices=ESTIMATORS, help="of all estimators")
    parser.add_argument("--ranks", nargs="+", type=int, help="of all numbers of ranks")
    chosen = parser.parse_args()
    name = "onepass-quick.json" if chosen.quick else "onepass.json"
    out = chosen.out or results / name
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    how = settings(chosen.quick)
    some = bool(chosen.only or chosen.ranks)
    source = out if some else chosen.beside
    earlier = read(source) if source else {}
    columns = earlier.get("columns", {})
    for name in ("samples", "seeds") if earlier else ():
        if earlier["settings"][name] != how[name]:
            parser.error(f"{source} is of {earlier['settings'][name]} {name}: no comparison")
    if chosen.label in columns and not some:
        parser.error(f"{source} has a column {chosen.label!r}: pass another --label")
    rows = {key(row): row for row in columns.get(chosen.label, [])}
    estimators = chosen.only or ESTIMATORS
    out.parent.mkdir(parents=True, exist_ok=True)
    for world in chosen.ranks or how["worlds"]:
        several = world > 1
        for row in shared(how, estimators, world) if several else alone(how, estimators):
            rows[key(row)] = row
            print(f"{key(row)}: {shown(row)}", flush=True)
            content = {"settings": how, "columns": columns | {chosen.label: list(rows.values())}}
            write(out, content)
            out.with_suffix(".md").write_text(table(content))


if __name__ == "__main__":
    main()
