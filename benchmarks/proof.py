"""What the check of every layer's samples costs: `python benchmarks/proof.py`, as a markdown table.

K-FOC's whole fit with and without it, in turns in one process; medians, and their ratio.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import torch

from methods import kfoc_fit
from workloads import Workload, load

WORKLOADS = ("regression-500", "mlp-128", "mlp-512", "lenet-256", "cnn-64", "gpt-8", "digits-mlp")


def seconds(workload: Workload, verify: bool) -> float:
    import kfoc

    start = time.perf_counter()
    kfoc_fit(workload, kfoc.KFOC(), verify=verify)
    return time.perf_counter() - start


def row(name: str, repeats: int, batches: int) -> str:
    workload = load(name)
    many: Any = workload
    if batches > 1:
        many = type(workload)(**{**vars(workload), "batches": workload.batches * batches})
    with_, without = [], []
    for _ in range(repeats + 1):  # the first of each warms up
        with_.append(seconds(many, True))
        without.append(seconds(many, False))
    checked, plain = (1e3 * statistics.median(each[1:]) for each in (with_, without))
    size = len(many.batches[0][0])
    return (
        f"| {name} | {len(many.batches)} x {size} | {plain:.1f} | {checked:.1f} "
        f"| {checked / plain:.3f} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("names", nargs="*", default=WORKLOADS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print("| workload | batches | unchecked, ms | checked, ms | ratio |\n|---|---|---|---|---|")
    for name in arguments.names:
        print(row(name, arguments.repeats, 1), flush=True)
        if len(load(name).batches) == 1:
            print(row(name, max(3, arguments.repeats // 3), 10), flush=True)


if __name__ == "__main__":
    main()
