"""The targets of the project for speed and memory, and whether a run meets them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

Record = dict[str, Any]
Table = dict[tuple[str, str], Record]

PEER = "curvlinops-kfac"
RESOLUTION = 2**20  # bytes; resident memory is counted too coarsely to compare less

# The time of K-FOC with its defaults, over that of this library's K-FAC.
TO_KFAC = {
    "mlp-128": 1.2,
    "mlp-512": 1.2,
    "mlp-4096": 1.8,
    "lenet-256": 1.05,
    "cnn-64": 1.4,
    "resnet18-32": 1.2,
    "gpt-8": 2.0,
    "vit-32": 2.0,
    "digits-mlp": 1.8,
    "digits-lenet": 1.1,
}
LARGE_TO_KFAC = 2.0  # GPT-2's shape, by large.py
DEFAULTS = ("kfoc", "kfoc-online")


@dataclass(frozen=True)
class Check:
    """One figure of one workload against its limit."""

    figure: str
    workload: str
    method: str
    value: float
    limit: float

    @property
    def verdict(self) -> str:
        return "met" if self.value <= self.limit else "missed"

    def __str__(self) -> str:
        sign = "≤" if self.value <= self.limit else ">"
        return f"{self.figure} {self.value:.3g} {sign} {self.limit:g}: {self.verdict}"

    def record(self) -> Record:
        return asdict(self) | {"verdict": self.verdict}


def tabled(records: Iterable[Record]) -> Table:
    """Records by (workload, method), the failed ones left out."""
    return {(r["workload"], r["method"]): r for r in records if "error" not in r}


def ratio(table: Table, workload: str, method: str, other: str) -> float | None:
    """Ratio of the medians of two methods on one workload."""
    if (workload, method) not in table or (workload, other) not in table:
        return None
    return table[workload, method]["milliseconds"] / table[workload, other]["milliseconds"]


def memory_ratio(table: Table, workload: str, method: str, other: str) -> float | None:
    """Ratio of peaks: of resident memory, or of tensor bytes where the former is too coarse."""
    if (workload, method) not in table or (workload, other) not in table:
        return None
    ours, theirs = table[workload, method], table[workload, other]
    coarse = min(ours["peak_bytes"], theirs["peak_bytes"]) < RESOLUTION
    key = "peak_tensor_bytes" if coarse else "peak_bytes"
    return ours[key] / theirs[key]


def checks(records: Iterable[Record]) -> list[Check]:
    table = tabled(records)
    found = [check for workload, method in table for check in row_checks(table, workload, method)]
    return found + overall(table)


def row_checks(table: Table, workload: str, method: str) -> Iterator[Check]:
    """The checks that belong to one row of the table."""
    to_peer = ratio(table, workload, method, PEER)
    if method == "kfac" and to_peer is not None:
        yield Check("K-FAC/curvlinops", workload, method, to_peer, 0.8)
    if method in DEFAULTS:
        limit, to_kfac = TO_KFAC.get(workload), ratio(table, workload, method, "kfac")
        if limit is not None and to_kfac is not None:
            yield Check("K-FOC/K-FAC", workload, method, to_kfac, limit)
        memory = memory_ratio(table, workload, method, PEER)
        if memory is not None:
            yield Check("memory/curvlinops", workload, method, memory, 1.0)


def overall(table: Table) -> list[Check]:
    """The geometric mean of K-FOC's (on data sets: online's) time over curvlinops'."""
    ratios = [
        value
        for workload, method in table
        if method in DEFAULTS and (value := ratio(table, workload, method, PEER)) is not None
    ]
    if not ratios:
        return []
    mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
    return [Check("K-FOC/curvlinops, geometric mean", "all", "kfoc", mean, 1.0)]
