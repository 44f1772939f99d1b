"""Where K-FOC stops: what each tolerance costs, and what it leaves, beside another draw of labels.

    python benchmarks/tolerance.py [--workloads NAME ...] [--repeats 5]

Of each workload: the median time of a fit over K-FAC's, in turns; by how much the worst layer's
relative error is above the optimum's (`quality.py`); and how far blocks are from the optimum's, as
1 - cosine, the largest of all layers. The last line of a workload is the optimum of labels drawn
once more. Written to results/tolerance.json and .md, after each workload.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import kfoc
from kfoc.reproduce import results
from machine import describe
from methods import kfoc_fit, set_threads
from quality import all_samples, compared, optimum
from workloads import Workload, load

RESULTS = Path(__file__).parent / "results" / "tolerance.json"
RTOLS = (None, 1e-3, 1e-4, 1e-6)
WORKLOADS = ("mlp-128", "mlp-512", "lenet-256", "cnn-64", "gpt-8", "vit-32")


def far(block: Any, other: Any) -> float:
    """1 - cosine of two Kronecker products, in float64."""
    cosine = 1.0
    for side in ("left", "right"):
        one, two = (getattr(each, side).double() for each in (block, other))
        cosine *= ((one * two).sum() / one.norm() / two.norm()).item()
    return 1 - cosine


def medians(workload: Workload, estimators: list[Any], repeats: int) -> list[float]:
    """Seconds of a fit by each of them, in turns, after one that is not counted."""
    taken: list[list[float]] = [[] for _ in estimators]
    for repeat in range(repeats + 1):
        for times, estimator in zip(taken, estimators, strict=True):
            start = time.perf_counter()
            kfoc_fit(workload, estimator)
            if repeat:
                times.append(time.perf_counter() - start)
    return [sorted(times)[len(times) // 2] for times in taken]


def rows(name: str, repeats: int) -> list[dict[str, Any]]:
    workload = load(name)
    estimators = [kfoc.KFAC(), *(kfoc.KFOC(rtol=rtol) for rtol in RTOLS)]
    kfac, *times = medians(workload, estimators, repeats)
    best = optimum(workload)
    samples = all_samples(workload)
    norms = {layer: of_layer.squared_norm() for layer, of_layer in samples.items()}
    found = []
    for rtol, seconds in zip(RTOLS, times, strict=True):
        blocks = kfoc_fit(workload, kfoc.KFOC(rtol=rtol))
        gaps = [
            compared(samples[layer], norms[layer], blocks[layer], best[layer])["gap"]
            for layer in workload.layers
        ]
        moved = [far(blocks[layer], best[layer]) for layer in workload.layers]
        asked = "default" if rtol is None else f"rtol {rtol:g}"
        found.append(row(name, asked, seconds / kfac, max(gaps), max(moved)))
    again = kfoc_fit(workload, kfoc.KFOC(), seed=1)
    moved = [far(again[layer], best[layer]) for layer in workload.layers]
    return [*found, row(name, "labels drawn once more", None, None, max(moved))]


def row(
    workload: str, asked: str, ratio: float | None, excess: float | None, moved: float
) -> dict[str, Any]:
    return {
        "workload": workload,
        "stops at": asked,
        "time / K-FAC": ratio,
        "worst excess of the relative error": excess,
        "worst 1 - cosine": moved,
    }


def page(found: list[dict[str, Any]]) -> str:
    lines = [[shown(value) for value in each.values()] for each in found]
    return results.markdown([*found[0]], lines, words=(0, 1)) + "\n"


def shown(value: Any) -> str:
    if value is None:
        return ""
    return value if isinstance(value, str) else f"{value:.2g}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--workloads", nargs="+", default=WORKLOADS)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    set_threads(options.threads)
    found: list[dict[str, Any]] = []
    for name in options.workloads:
        found += rows(name, options.repeats)
        results.write(RESULTS, {"machine": describe(options.threads), "rows": found})
        RESULTS.with_suffix(".md").write_text(page(found))
    print(page(found))


if __name__ == "__main__":
    main()
