"""The benchmark: every method in its own process, taking turns; one table and one JSON.

python benchmarks/run.py [--quick] [--workloads 'mlp-*' ...] [--repeats 9] [--out FILE]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from fnmatch import fnmatch
from importlib.util import find_spec
from pathlib import Path

from kfoc.reproduce import results
from machine import QUIET, describe, earlier, matrix_product_rate, wait_until_quiet
from measure import measure
from methods import DATA_SET, ONE_BATCH, set_threads
from report import page
from targets import PEER, Record, checks
from workloads import WORKLOADS

RESULTS = Path(__file__).resolve().parent / "results" / "benchmark.json"
QUICK = ("regression-500", "mlp-128", "lenet-256", "digits-lenet")
PEER_MISSING = (
    "curvlinops is not installed, so its columns stay empty: "
    "pip install --no-deps -r benchmarks/requirements-peers.txt"
)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Time and memory of K-FOC beside K-FAC's.")
    parser.add_argument("--workloads", nargs="+", help="names or patterns; default: all")
    parser.add_argument("--methods", nargs="+", help="names or patterns; default: all")
    parser.add_argument("--repeats", type=int, help="timed repeats (default 9, or 3 if --quick)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="four workloads, three repeats")
    parser.add_argument("--patience", type=float, default=60, help="seconds to wait for idle cores")
    parser.add_argument("--no-quality", action="store_true", help="leave the relative errors out")
    parser.add_argument("--out", type=Path, help="JSON file; the table goes beside it as .md")
    return parser.parse_args(arguments)


def chosen(names: tuple[str, ...], patterns: Sequence[str] | None) -> list[str]:
    """The names that match a pattern, in order; an unmatched pattern ends the run."""
    if patterns is None:
        return list(names)
    for pattern in patterns:
        if not any(fnmatch(name, pattern) for name in names):
            raise SystemExit(f"{pattern!r} matches none of {', '.join(names)}")
    return [name for name in names if any(fnmatch(name, p) for p in patterns)]


def methods_of(workload: str, patterns: Sequence[str] | None) -> list[str]:
    names: tuple[str, ...] = DATA_SET if workload.startswith("digits") else ONE_BATCH
    if find_spec("curvlinops") is None:
        names = tuple(name for name in names if name != PEER)
    return [n for n in names if patterns is None or any(fnmatch(n, p) for p in patterns)]


def write(out: Path, document: Record) -> None:
    """JSON and table as they stand; called after each workload, so that Ctrl-C keeps the rest."""
    for part in ("conditions", "rows"):
        document[part].sort(key=lambda each: list(WORKLOADS).index(each["workload"]))
    document["targets"] = [check.record() for check in checks(document["rows"])]
    out.parent.mkdir(parents=True, exist_ok=True)
    results.write(out, document)
    out.with_suffix(".md").write_text(page(document))


def begun(out: Path, machine: Record, settings: Record, workloads: list[str]) -> Record:
    """What is there of other workloads, by the same settings on the same machine."""
    kept: Record = {"machine": machine, "settings": settings}
    there = earlier(out, **kept)
    for part in ("conditions", "rows"):
        kept[part] = [each for each in there.get(part, []) if each["workload"] not in workloads]
    return kept


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def conditions(workload: str, patience: float) -> Record:
    """What the machine gives just before a workload: idle cores, and its matrix products."""
    busy = wait_until_quiet(patience)
    rate = matrix_product_rate()
    say(f"{workload} (a matrix product reaches {rate:.0f} GFLOP/s)")
    if busy is not None and busy > QUIET:
        say(f"  others keep {busy:.1f} cores busy: take these times with a grain of salt")
    return {"workload": workload, "busy_cores": busy, "gflops_of_mm": rate}


def main() -> int:
    options = parse()
    set_threads(options.threads)
    workloads = chosen(tuple(WORKLOADS), options.workloads or (QUICK if options.quick else None))
    repeats = options.repeats or (3 if options.quick else 9)
    out = options.out or (RESULTS.with_stem("quick") if options.quick else RESULTS)
    if find_spec("curvlinops") is None:
        say(PEER_MISSING)
    settings = {"repeats": repeats, "quick": options.quick, "threads": options.threads}
    document = begun(out, describe(options.threads), settings, workloads)
    for workload in workloads:
        document["conditions"].append(conditions(workload, options.patience))
        document["rows"] += measure(
            workload,
            methods_of(workload, options.methods),
            repeats=repeats,
            threads=options.threads,
            quality=not options.no_quality,
        )
        write(out, document)
    print(page(document))
    return int(any("error" in record for record in document["rows"]))


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
