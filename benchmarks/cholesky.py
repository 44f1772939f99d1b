"""An eigendecomposition against a Cholesky one, of factors as large as GPT-2's.

    python benchmarks/cholesky.py [--sizes 768 2305 3073]

Processor seconds of one thread in float32, for a factor of n rows and solves of n x n numbers with
a block of two such factors and a factored damping of 1e-3; errors are against float64, where that
is not too large. The table is that of docs/scale.md; also written to results/cholesky.json, .md.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import kfoc
from kfoc.blocks import Damping
from kfoc.linalg.eigen import eigh
from kfoc.reproduce import results
from machine import describe

RESULTS = Path(__file__).parent / "results" / "cholesky.json"
DAMPING = 1e-3
LARGEST = 3000  # of errors
HEADER = [
    "n",
    "eigendecomposition",
    "Cholesky",
    "ratio",
    "solve by eigenvectors",
    "by Cholesky",
    "error by eigenvectors",
    "by Cholesky",
]


def timed(call: Callable[[], Any]) -> tuple[Any, float]:
    start = time.process_time()
    found = call()
    return found, time.process_time() - start


def measured(n: int) -> dict[str, Any]:
    torch.manual_seed(0)
    rows = torch.randn(n + 50, n) * torch.linspace(0.01, 3, n)
    factor, vectors = rows.mT @ rows / len(rows), torch.randn(n, n)
    block, damping = kfoc.KroneckerBlock(factor, factor), Damping(DAMPING, method="pi")
    _, by_eigen = timed(lambda: eigh(factor))
    damped, by_cholesky = timed(lambda: block.damped(damping))  # of two factors
    first, solve = timed(lambda: damped.power(vectors, -1))
    block.spectrum()  # which the block keeps, and is damped by from now on
    second, solve_by_eigen = timed(lambda: block.damped(damping).power(vectors, -1))
    errors = [error(factor, vectors, found) for found in (second, first)]
    return dict(
        zip(
            HEADER[:6],
            [n, by_eigen, by_cholesky / 2, 2 * by_eigen / by_cholesky, solve_by_eigen, solve],
            strict=True,
        )
    ) | {"errors": errors}


def error(factor: Tensor, vectors: Tensor, found: Tensor) -> float | None:
    if len(factor) > LARGEST:
        return None
    damped = factor.double() + math.sqrt(DAMPING) * torch.eye(len(factor), dtype=torch.float64)
    half = torch.linalg.solve(damped, vectors.double())
    expected = torch.linalg.solve(damped, half.mT).mT
    return ((found - expected).norm() / expected.norm()).item()


def lines(rows: list[dict[str, Any]]) -> Iterator[list[str]]:
    for row in rows:
        n, eigen, cholesky, ratio, *solves = (row[name] for name in HEADER[:6])
        errors = ["" if each is None else f"{each:.1e}" for each in row["errors"]]
        shown = [f"{n:,}", f"{eigen:.2f}", f"{cholesky:.3f}", f"{ratio:.0f}"]
        yield [*shown, *(f"{each:.2f}" for each in solves), *errors]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--sizes", nargs="+", type=int, default=[768, 2305, 3073])
    sizes = parser.parse_args().sizes
    torch.set_num_threads(1)
    rows = [measured(n) for n in sizes]
    results.write(RESULTS, {"machine": describe(threads=1), "rows": rows})
    table = results.markdown(HEADER, lines(rows))
    RESULTS.with_suffix(".md").write_text(table + "\n")
    print(table)


if __name__ == "__main__":
    main()
