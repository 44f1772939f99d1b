"""The study's tables from its results, as a page of their own and inside docs/study.md.

python study/report.py [FOLDER]                    writes FOLDER/study.md
python study/report.py FOLDER --page PAGE          puts the tables into a page, between markers
python study/report.py FOLDER --page PAGE --check  fails where the page's tables are others
"""

from __future__ import annotations

import argparse
import functools
import re
from collections.abc import Callable
from pathlib import Path

import summary
import tables
import tables_of_training
from borrowed import ROOT
from kfoc.reproduce.results import read

HERE = Path(__file__).parent
BENCHMARK = ROOT / "benchmarks" / "results" / "optimizer.json"
PARTS = {"errors", "inverse", "laplace", "optimizer", "continual", "influence", "pruning"}
# Name of a table -> the part that it is of, what it is, and what makes it.
TABLES: dict[str, tuple[str, str, Callable[[tables.Results], str]]] = {
    "verdict": ("all", "K-FOC against K-FAC", summary.verdict),
    "summary": ("all", "All pairs, by kind of network", summary.summary),
    "errors": ("errors", "Relative error of the blocks", tables.errors),
    "solve": (
        "inverse",
        "Relative error of the solve, mean gradient, by damping",
        functools.partial(tables.by_damping, key="solve"),
    ),
    "gain": (
        "inverse",
        "Gain of the solve, mean gradient, by damping",
        functools.partial(tables.by_damping, key="gain"),
    ),
    "solve-random": (
        "inverse",
        "Relative error of the solve, random vectors, by damping",
        functools.partial(tables.by_damping, key="solve, random"),
    ),
    "gain-factored": (
        "inverse",
        "Gain of the solve with factored damping, mean gradient",
        functools.partial(tables.by_damping, key="gain, factored"),
    ),
    "logdet": (
        "inverse",
        "Error of the log-determinant by parameter, by damping",
        functools.partial(tables.by_damping, key="logdet"),
    ),
    "bands": ("inverse", "Share of trace F by band of F's eigenvectors, %", tables.bands),
    "overshoot": ("inverse", "Overshoot, by stage and damping", tables.overshoot),
    "laplace-evidence": (
        "laplace",
        "Laplace posteriors, evidence less that of the exact blocks",
        tables_of_training.laplace_evidence,
    ),
    "laplace": ("laplace", "Laplace posteriors, predictions", tables_of_training.laplace),
    "benchmark": ("benchmark", "Natural gradients, larger networks", tables.benchmark),
    "optimizer": ("optimizer", "Natural gradients", tables_of_training.optimizer),
    "optimizer-pairs": (
        "optimizer",
        "Natural gradients, K-FOC by K-FAC",
        tables_of_training.optimizer_pairs,
    ),
    "optimizer-why": (
        "optimizer",
        "Natural gradients, curvatures in each other's size",
        tables_of_training.optimizer_why,
    ),
    "continual": ("continual", "Five tasks", tables_of_training.continual),
    "influence": ("influence", "Influence against leaving out", tables.influence),
    "influence-products": (
        "influence",
        "Influence by products with the true Fisher",
        tables.products,
    ),
    "pruning": ("pruning", "Accuracy of pruned networks", tables.pruning),
}


def made(folder: Path) -> dict[str, str]:
    """All tables whose results are there, by name."""
    results = {path.stem: read(path) for path in sorted(folder.glob("*.json"))}
    results["benchmark"] = read(BENCHMARK)
    if results.keys() >= PARTS:
        results["all"] = {"rows": [True]}
    return {
        name: make(results)
        for name, (part, _, make) in TABLES.items()
        if part in results and results[part]["rows"]
    }


def filled(page: str, found: dict[str, str]) -> str:
    """The page with its tables in place: each after `<!-- table NAME -->`, up to `<!-- end -->`."""

    def replaced(match: re.Match[str]) -> str:
        return f"<!-- table {match[1]} -->\n\n{found[match[1]]}\n\n<!-- end -->"

    return re.sub(r"<!-- table ([\w-]+) -->.*?<!-- end -->", replaced, page, flags=re.S)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", nargs="?", default=str(HERE / "results"))
    parser.add_argument("--page", help="a page with markers for the tables")
    parser.add_argument("--check", action="store_true", help="compare, and write nothing")
    arguments = parser.parse_args()
    folder = Path(arguments.folder)
    found = made(folder)
    whole = "\n\n".join(f"## {TABLES[name][1]}\n\n{table}" for name, table in found.items())
    targets = {folder / "study.md": f"# Tables of the study\n\n{whole}\n"}
    if arguments.page:
        page = Path(arguments.page)
        targets[page] = filled(page.read_text(), found)
    for path, content in targets.items():
        if not arguments.check:
            path.write_text(content)
        elif path.read_text() != content:
            raise SystemExit(f"{path} is not what the results give: run python study/report.py")


if __name__ == "__main__":
    main()
