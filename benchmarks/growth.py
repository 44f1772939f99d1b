"""Time and memory of K-FOC and K-FAC against samples, width and positions; plot and exponents.

python benchmarks/growth.py [--quick] [--families samples ...] [--repeats 3]
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import numpy as np
from matplotlib import pyplot
from matplotlib.axes import Axes

from kfoc.compare.looks import look
from kfoc.reproduce.results import read, write
from machine import describe, wait_until_quiet
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
QUANTITIES = {"milliseconds": "time (ms)", "peak_bytes": "peak memory (MB)"}
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
        if r["workload"].partition("=")[0] == family and r["method"] == method and "error" not in r
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
    shown: list[float] = []
    ticks: list[int] = []
    for method, label in METHODS.items():
        sizes, values = series(records, family, method, quantity)
        slope = exponent(sizes, values)
        text = label if slope is None else f"{label}: {slope:.2f}"
        axes.plot(sizes, values, "-", **look(label), label=text, markersize=4)
        shown += [value for value in values if value > 0]
        ticks = sorted({*ticks, *sizes})
    axes.set_xscale("log")
    axes.set_yscale("log")
    if shown:  # whole decades, with room for the legend above the lines
        bottom, top = np.log10(min(shown)), np.log10(max(shown))
        axes.set_ylim(10 ** np.floor(bottom), 10 ** (top + 0.25 + 0.5 * (top - np.floor(bottom))))
    axes.set_xticks(ticks, [f"{tick}" for tick in ticks], rotation=45, fontsize=8)
    axes.minorticks_off()
    axes.grid(True, alpha=0.3)
    axes.legend(title="exponent", fontsize=8, title_fontsize=8, loc="upper left")


def draw(records: list[Record], families: list[str], path: Path) -> None:
    figure, grid = pyplot.subplots(
        len(QUANTITIES), len(families), figsize=(3.4 * len(families), 6.2), squeeze=False,
        layout="constrained",
    )  # fmt: skip
    for row, (quantity, label) in zip(grid, QUANTITIES.items(), strict=True):
        for axes, family in zip(row, families, strict=True):
            draw_panel(axes, records, family, quantity)
        row[0].set_ylabel(label)
    for axes, family in zip(grid[0], families, strict=True):
        axes.set_title(TITLES[family], fontsize=10)
    for axes, family in zip(grid[-1], families, strict=True):
        axes.set_xlabel(TITLES[family].split(",")[0].split("\n")[0])
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="How K-FOC's time and memory grow beside K-FAC's.")
    parser.add_argument("--families", nargs="+", choices=list(SIZES), default=list(SIZES))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--patience", type=float, default=20, help="seconds to wait for idle cores")
    parser.add_argument("--quick", action="store_true", help="the four smallest sizes, one repeat")
    parser.add_argument("--draw", action="store_true", help="of the results that are there")
    parser.add_argument("--out", type=Path, help="PNG; the JSON goes beside it (growth.png)")
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
    records: list[Record] = []
    if options.draw:
        draw(read(out.with_suffix(".json"))["rows"], options.families, out)
        return 0
    for family in options.families:
        for size in SIZES[family][:4] if options.quick else SIZES[family]:
            records += point(f"{family}={size}", options)
        keep(records, options, out)
    return int(any("error" in record for record in records))


def keep(records: list[Record], options: argparse.Namespace, out: Path) -> None:
    """Plot and JSON of the families measured so far."""
    measured = {record["workload"].partition("=")[0] for record in records}
    families = [family for family in options.families if family in measured]
    machine = describe(options.threads)
    content = {"machine": machine, "exponents": exponents(records, families), "rows": records}
    write(out.with_suffix(".json"), content)
    draw(records, families, out)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
