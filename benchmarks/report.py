"""One table of a run, in Markdown."""

from __future__ import annotations

from typing import Any

from kfoc.reproduce.results import markdown
from machine import said
from targets import PEER, Record, Table, checks, memory_ratio, ratio, row_checks, tabled

HEADER = (
    "workload",
    "method",
    "ms",
    "/ gradient",
    "/ K-FAC",
    "/ curvlinops",
    "peak MB",
    "peak / curvlinops",
    "G multiply-adds",
    "mean relative error",
    "worst gap to optimum",
    "targets",
)


def number(value: float | None, digits: str = ".2f") -> str:
    return "" if value is None else format(value, digits)


def gap(value: float | None) -> str:
    """Under what the float32 factors themselves resolve, a gap is none."""
    if value is None:
        return ""
    return format(value, ".1e") if value > 1e-7 else "< 1e-7"


def row(record: Record, table: Table) -> list[str]:
    workload, method = record["workload"], record["method"]
    if "error" in record:
        last = record["error"].splitlines()[-1]
        return [workload, method, "failed", *[""] * 8, last.replace("|", "/")[:120]]
    quality: dict[str, Any] = record.get("quality") or {}
    return [
        workload,
        method,
        number(record["milliseconds"], ".3g" if record["milliseconds"] < 10 else ".0f"),
        number(ratio(table, workload, method, "gradient")),
        number(ratio(table, workload, method, "kfac")),
        number(ratio(table, workload, method, PEER)),
        number(record["peak_bytes"] / 1e6, ".1f"),
        number(memory_ratio(table, workload, method, PEER)),
        number(record["multiply_adds"] / 1e9, ".3g"),
        number(quality.get("mean_relative_error"), ".4f"),
        gap(quality.get("worst_gap")),
        "; ".join(str(check) for check in row_checks(table, workload, method)),
    ]


def page(document: Record) -> str:
    """The table, how many targets were met, and what it was measured on."""
    records = document["rows"]
    table = tabled(records)
    body = markdown(HEADER, [row(record, table) for record in records], words=(0, 1, 11))
    return f"{body}\n\n{verdicts(records)}\n\n{circumstances(document)}\n"


def verdicts(records: list[Record]) -> str:
    found = checks(records)
    met = sum(check.verdict == "met" for check in found)
    lines = [f"{met} of {len(found)} targets met."]
    lines += [f"- {c.workload}, {c.method}: {c}" for c in found if c.verdict != "met"]
    lines += [f"- {c}" for c in found if c.workload == "all" and c.verdict == "met"]
    return "\n".join(lines)


def circumstances(document: Record) -> str:
    """The machine, the rate of a plain matrix product, and how much others disturbed."""
    about = said(document["machine"])
    rates = [c["gflops_of_mm"] for c in document["conditions"]]
    busy = max((c["busy_cores"] or 0.0 for c in document["conditions"]), default=0.0)
    repeats = document["settings"]["repeats"]
    return (
        f"Medians of {repeats} repeats, methods in turn. {about}. A float32 matrix product of "
        f"1024 cubed reached {min(rates):.0f} to {max(rates):.0f} GFLOP/s; others kept up to "
        f"{busy:.2f} cores busy before a workload."
    )
