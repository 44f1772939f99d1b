"""A part's results in one JSON file, written after each row: what is done survives Ctrl-C."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from borrowed import borrowed
from kfoc.files.writing import write_text

Row = dict[str, Any]


def keep(rows: Iterable[Row], settings: dict[str, Any], path: Path) -> Iterator[Row]:
    """Pass the rows on; all of them so far are in the file, which says whether it is complete."""
    start = time.process_time()
    machine = borrowed("benchmarks/machine.py").describe(threads=1)
    content: dict[str, Any] = {"complete": False, "settings": settings, "machine": machine}
    content["rows"] = []
    for row in rows:
        content["rows"].append(rounded(row))
        write(content, path)
        yield row
    content["complete"] = True
    content["processor seconds"] = round(time.process_time() - start)
    write(content, path)


def rounded(value: Any) -> Any:
    """Six digits of every float: more of them would be noise in the file."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    return [rounded(item) for item in value] if isinstance(value, (list, tuple)) else value


def write(content: dict[str, Any], path: Path) -> None:
    """Whole or not at all."""
    write_text(path, json.dumps(content, allow_nan=False).replace('{"', '\n{"') + "\n")


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


def where(rows: Iterable[Row], **wanted: Any) -> list[Row]:
    """The rows with these values."""
    return [row for row in rows if all(row.get(key) == value for key, value in wanted.items())]


def values(rows: Iterable[Row], key: str, **wanted: Any) -> list[float]:
    """A column of the rows with these values, without the missing ones."""
    return [row[key] for row in where(rows, **wanted) if row.get(key) is not None]


def spread(found: list[float], digits: int = 3) -> str:
    """Mean ± standard deviation, as a table has it."""
    if not found:
        return "-"
    mean = f"{statistics.fmean(found):.{digits}f}"
    return mean + (f" ± {statistics.stdev(found):.{digits}f}" if len(found) > 1 else "")


def significant(found: list[float]) -> str:
    """Mean ± standard deviation of losses of any size."""
    deviation = f" ± {statistics.stdev(found):.1g}" if len(found) > 1 else ""
    return f"{statistics.fmean(found):.2g}{deviation}"


def distinct(rows: Iterable[Row], key: str) -> list[Any]:
    """A column's values, in the order of their first appearance."""
    return list(dict.fromkeys(row[key] for row in rows))
