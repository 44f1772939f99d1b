"""Time and memory of K-FOC and K-FAC against samples, width and positions; plot and exponents.

python benchmarks/growth.py [--quick] [--families samples ...] [--repeats 3]
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from kfoc.compare.looks import COLUMN, STYLE, look
from kfoc.reproduce.results import read, save, write
from machine import describe, earlier, wait_until_quiet
from measure import Record, measure
from methods import set_threads
from run import say

HERE = Path(__file__).resolve().parent
METHODS = {"gradient": "gradient", "kfac": "K-FAC", "kfoc": "K-FOC"}
SIZES = {
    "samples": (1000, 2000, 4000, 8000, 16000, 32000, 60000),
    "stream": (1000, 2000, 4000, 8000, 16000, 32000, 60000),
    "width-128": (128, 256, 512, 1024, 2048, 4096),
    "width-512": (128, 256, 512, 1024, 2048, 4096),
    "positions": (16, 32, 64, 128, 256, 512, 1024),
}
TITLES = {
    "samples": "samples N, one batch\nMLP 784-256-256-10",
    "stream": "samples N, batches of 500\nMLP 784-256-256-10",
    "width-128": "width o = i\none linear layer, N = 128",
    "width-512": "width o = i\none linear layer, N = 512",
    "positions": "positions T\nlayer 256 to 192, N = 8",
}
QUANTITIES = {"milliseconds": "time (ms)", "peak_bytes": "memory (MB)"}
UNITS = {"milliseconds": 1.0, "peak_bytes": 1e-6}
FITTED = 4  # the largest sizes: small ones measure overheads


def exponent(sizes: list[int], values: list[float]) -> float | None:
    """The slope of log value against log size by least squares, over the largest sizes."""
    pairs = [(s, v) for s, v in zip(sizes, values, strict=True) if v > 0][-FITTED:]
    if len(pairs) < 2:
        return None
    logs = np.log(np.array(pairs, dtype=float))
    return float(np.polyfit(logs[:, 0], logs[:, 1], 1)[0])


def series(records: list[Record], family: str, method: str, quantity: str) -> tuple[list, list]:
    """Sizes and values of one line of the plot."""
    found = [
        (int(r["workload"].partition("=")[2]), r[quantity] * UNITS[quantity])
        for r in records
        if family_of(r) == family and r["method"] == method and "error" not in r
    ]
    return [size for size, _ in found], [value for _, value in found]


def exponents(records: list[Record], families: list[str]) -> Record:
    return {
        family: {
            method: {q: exponent(*series(records, family, method, q)) for q in QUANTITIES}
            for method in METHODS
        }
        for family in families
    }


def draw_panel(axes: Axes, records: list[Record], family: str, quantity: str) -> None:
    """The lines of all methods, and their exponents in their colours."""
    shown: list[float] = []
    ticks: list[int] = []
    for line, (method, label) in enumerate(METHODS.items()):
        sizes, values = series(records, family, method, quantity)
        axes.plot(sizes, values, **look(label), label=label, clip_on=False)
        if (slope := exponent(sizes, values)) is not None:
            place: dict[str, Any] = {"transform": axes.transAxes, "va": "top", "size": 7}
            place["bbox"] = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}
            text = f"{slope:.2f}".replace("-", "−")
            axes.text(0.03 + 0.34 * line, 1.02, text, color=look(label)["color"], **place)
        shown += [value for value in values if value > 0]
        ticks = sorted({*ticks, *sizes})
    axes.set(xscale="log", yscale="log")
    if shown:  # whole decades, with room for the exponents above the lines
        bottom, top = np.log10(min(shown)), np.log10(max(shown))
        axes.set_ylim(10 ** np.floor(bottom), 10 ** (top + 0.3 * (top - np.floor(bottom))))
    axes.set_xticks(
        ticks[::2], [f"{tick // 1000}k" if tick % 1000 == 0 else f"{tick}" for tick in ticks[::2]]
    )
    axes.minorticks_off()


def draw(records: list[Record], families: list[str], path: Path) -> None:
    """A row a family, time at the left and memory at the right, as PNG and SVG."""
    with rc_context(STYLE):
        figure = Figure(figsize=(COLUMN, 1.35 * len(families) + 0.3), layout="constrained")
        grid = figure.subplots(len(families), len(QUANTITIES), squeeze=False)
        for row, family in zip(grid, families, strict=True):
            what, where = TITLES[family].split("\n")
            for axes, (quantity, label) in zip(row, QUANTITIES.items(), strict=True):
                draw_panel(axes, records, family, quantity)
                axes.set(xlabel=what.split(",")[0], ylabel=label)
            row[0].set_title(f"{where}: {what}" if "," in what else where, loc="left")
        handles, labels = grid[0, 0].get_legend_handles_labels()
        place: dict[str, Any] = {"loc": "outside lower center", "ncols": len(METHODS)}
        title = f"numbers: exponents over the {FITTED} largest sizes"
        figure.legend(handles, labels, title=title, **place)
        save(figure, path)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="How K-FOC's time and memory grow beside K-FAC's.")
    parser.add_argument("--families", nargs="+", choices=list(SIZES), default=list(SIZES))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--patience", type=float, default=20, help="seconds to wait for idle cores")
    parser.add_argument("--quick", action="store_true", help="the four smallest sizes, one repeat")
    parser.add_argument("--draw", action="store_true", help="of the results that are there")
    parser.add_argument("--out", type=Path, help="PNG; SVG and JSON go beside it (growth.png)")
    return parser.parse_args(arguments)


def point(workload: str, options: argparse.Namespace) -> list[Record]:
    """One size of one family, by all methods; its record keeps what else the cores had to do."""
    busy = wait_until_quiet(options.patience)
    say(workload if busy is None else f"{workload} (others keep {busy:.1f} cores busy)")
    found = measure(
        workload,
        list(METHODS),
        repeats=1 if options.quick else options.repeats,
        threads=options.threads,
        memory_repeats=1,
    )
    return [record | {"busy_cores": busy} for record in found]


def main() -> int:
    options = parse()
    set_threads(options.threads)
    out = options.out or HERE / ("growth-quick.png" if options.quick else "growth.png")
    if options.draw:
        draw(read(out.with_suffix(".json"))["rows"], options.families, out)
        return 0
    records = others(options, out)
    for family in options.families:
        for size in SIZES[family][:4] if options.quick else SIZES[family]:
            records += point(f"{family}={size}", options)
        keep(records, options, out)
    return int(any("error" in record for record in records))


def family_of(record: Record) -> str:
    return str(record["workload"]).partition("=")[0]


def others(options: argparse.Namespace, out: Path) -> list[Record]:
    """What is there of families that are not measured now, on the same machine."""
    there = earlier(out.with_suffix(".json"), machine=describe(options.threads))
    rows = there.get("rows", [])
    return [record for record in rows if family_of(record) not in options.families]


def keep(records: list[Record], options: argparse.Namespace, out: Path) -> None:
    """Plot and JSON of the families measured so far."""
    measured = {family_of(record) for record in records}
    families = [family for family in SIZES if family in measured]
    machine = describe(options.threads)
    content = {"machine": machine, "exponents": exponents(records, families), "rows": records}
    write(out.with_suffix(".json"), content)
    draw(records, families, out)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
