"""Does optimality matter? Measures every part of the study, draws it, and writes its tables.

    python study/run.py [--quick] [--only errors laplace ...] [--jobs 2] [--out FOLDER]

Each part is a process on one thread, `--jobs` of them at a time. It writes PART.json after each
unit, and keeps what is there under the same settings: after Ctrl-C the same command goes on where
it was, and to measure again, one deletes the file. Plots and tables are made of all files there.
"""

from __future__ import annotations

import argparse
import importlib
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from borrowed import borrowed
from kfoc.reproduce.results import keep

HERE = Path(__file__).parent
# Part -> its module, slow ones first.
PARTS = {
    "optimizer": "training",
    "influence": "leaving_out",
    "errors": "errors",
    "continual": "continual",
    "pruning": "pruned",
    "inverse": "inverse",
    "laplace": "posteriors",
}


def measure(part: str, quick: bool, out: Path) -> None:
    """One part, in this process."""
    torch.set_num_threads(1)
    module = importlib.import_module(PARTS[part])
    start, count = time.perf_counter(), 0
    machine = borrowed("benchmarks/machine.py").describe(threads=1)
    for _ in keep(module.units(quick), module.settings(quick), out / f"{part}.json", machine):
        count += 1
    print(f"{part}: {count} rows in {time.perf_counter() - start:.0f} s", flush=True)


def measure_all(parts: list[str], arguments: argparse.Namespace) -> None:
    """Every part in a process of its own.

    Raises:
        SystemExit: a part failed; the others have been finished.
    """

    def start(part: str) -> int:
        command = [sys.executable, str(HERE / "run.py"), "--part", part, "--out", arguments.out]
        return subprocess.run(command + ["--quick"] * arguments.quick, check=False).returncode

    with ThreadPoolExecutor(arguments.jobs) as pool:
        codes = dict(zip(parts, pool.map(start, parts), strict=True))
    failed = [part for part, code in codes.items() if code]
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="tiny, to see that all of it runs")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART")
    parser.add_argument("--jobs", type=int, default=2, help="processes at a time")
    parser.add_argument("--out", default=str(HERE / "results"), help="folder of the results")
    parser.add_argument("--plots", help="folder of the plots; docs/study where --out is not given")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    out = Path(arguments.out)
    out.mkdir(parents=True, exist_ok=True)
    if arguments.part:
        measure(arguments.part, arguments.quick, out)
        return
    if arguments.quick and out == HERE / "results":
        parser.error("--quick needs an --out of its own: it would overwrite the results")
    measure_all(arguments.only, arguments)
    committed = out == HERE / "results"
    plots = Path(arguments.plots or (HERE.parent / "docs" / "study" if committed else out))
    page = ["--page", str(HERE.parent / "docs" / "study.md")] * committed
    for command in (["plots.py", str(out), str(plots)], ["report.py", str(out), *page]):
        subprocess.run([sys.executable, str(HERE / command[0]), *command[1:]], check=True)


if __name__ == "__main__":
    main()
