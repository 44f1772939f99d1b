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

TO_KFAC = {"regression": 1.15, "mlp": 1.15, "lenet": 0.8, "cnn": 1.5, "resnet18": 1.5, "gpt": 3.0}
DATA_SET_TO_KFAC = 1.5
EXCUSED = {"cnn": 2.0, "resnet18": 2.0}  # where the multiply-adds show why


@dataclass(frozen=True)
class Check:
    """One figure of one workload against its limit."""

    figure: str
    workload: str
    method: str
    value: float
    limit: float
    excused: float | None = None

    @property
    def verdict(self) -> str:
        if self.value <= self.limit:
            return "met"
        excused = self.excused is not None and self.value <= self.excused
        return f"within {self.excused}" if excused else "missed"

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
    family = workload.split("-")[0]
    to_peer = ratio(table, workload, method, PEER)
    if method == "kfac" and to_peer is not None:
        yield Check("K-FAC/curvlinops", workload, method, to_peer, 0.8)
    if method in ("kfoc", "kfoc-online"):
        limit = DATA_SET_TO_KFAC if method == "kfoc-online" else TO_KFAC.get(family)
        to_kfac = ratio(table, workload, method, "kfac")
        if limit is not None and to_kfac is not None:
            excused = EXCUSED.get(family)
            yield Check("K-FOC/K-FAC", workload, method, to_kfac, limit, excused)
        if to_peer is not None:
            limit = 2.5 if family == "gpt" else 1.2
            yield Check("K-FOC/curvlinops", workload, method, to_peer, limit)
    if method.startswith("kfoc"):
        memory = memory_ratio(table, workload, method, PEER)
        if memory is not None:
            yield Check("memory/curvlinops", workload, method, memory, 1.0)
    if (workload, method) == ("mlp-128", "kfoc"):
        milliseconds = table[workload, method]["milliseconds"]
        yield Check("milliseconds", workload, method, milliseconds, 40.0)


def overall(table: Table) -> list[Check]:
    """The geometric mean of K-FOC's (on data sets: online's) time over curvlinops'."""
    ratios = [
        value
        for workload, method in table
        if method in ("kfoc", "kfoc-online")
        and (value := ratio(table, workload, method, PEER)) is not None
    ]
    if not ratios:
        return []
    mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
    return [Check("K-FOC/curvlinops, geometric mean", "all", "kfoc", mean, 0.8)]
