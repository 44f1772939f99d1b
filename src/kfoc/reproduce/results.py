"""What the programs share: a file of results, tables of them, and files of pictures.

The file is JSON: rows, beside what they were measured under. `kfoc reproduce`, the study and the
benchmarks write it after each unit or workload, so that what is done survives Ctrl-C.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from kfoc.files.writing import replacing, write_text

Row = dict[str, Any]
# What is measured and kept at once: the columns that tell it from others, and what makes its rows.
Unit = tuple[Row, Callable[[], Iterable[Row]]]


def write(path: Path, content: dict[str, Any]) -> None:
    """Whole or not at all, a line a row."""
    write_text(path, json.dumps(content, allow_nan=False).replace('{"', '\n{"').lstrip() + "\n")


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def keep(
    units: Iterable[Unit], settings: dict[str, Any], path: Path, machine: dict[str, Any]
) -> Iterator[Row]:
    """Measure the units that are not in the file, and pass on all rows, with their unit's columns.

    What is there under the same settings is kept; what is there under others is measured again.
    The file says whether it is complete.
    """
    content: dict[str, Any] = {"complete": False, "settings": settings, "machine": machine}
    there = read(path) if path.exists() else {}
    same = there.get("settings") == json.loads(json.dumps(settings))
    content["rows"] = there["rows"] if same else []
    before = there.get("processor seconds", 0) if same else 0
    content["processor seconds"] = before
    start, complete = time.process_time(), same and there.get("complete", False)
    for unit, make in units:
        found = where(content["rows"], **unit)
        if not found:
            found = [rounded(unit | row) for row in make()]
            content["rows"] += found
            content["processor seconds"] = before + round(time.process_time() - start)
            write(path, content)
            complete = False
        yield from found
    if not complete:
        write(path, content | {"complete": True})


def rounded(value: Any) -> Any:
    """Six digits of every float: more of them would be noise in the file."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    return [rounded(item) for item in value] if isinstance(value, (list, tuple)) else value


def save(figure: Any, path: Path) -> list[Path]:
    """A picture of matplotlib's as PNG and as SVG, under the path's name."""
    paths = [path.with_suffix(suffix) for suffix in (".png", ".svg")]
    for target in paths:
        kind = target.suffix[1:]
        # Without a date the same results give the same file.
        metadata = {"Date": None} if kind == "svg" else None
        with replacing(target) as temporary:
            figure.savefig(temporary, format=kind, metadata=metadata)
    return paths


def where(rows: Iterable[Row], **wanted: Any) -> list[Row]:
    """The rows with these values."""
    return [row for row in rows if all(row.get(key) == value for key, value in wanted.items())]


def values(rows: Iterable[Row], key: str, **wanted: Any) -> list[float]:
    """A column of the rows with these values, without the missing ones."""
    return [row[key] for row in where(rows, **wanted) if row.get(key) is not None]


def distinct(rows: Iterable[Row], key: str) -> list[Any]:
    """A column's values, in the order of their first appearance."""
    return list(dict.fromkeys(row[key] for row in rows))


def spread(found: Sequence[float], digits: int = 3) -> str:
    """Mean ± standard deviation, as a table has it."""
    if not found:
        return "-"
    mean = f"{statistics.fmean(found):.{digits}f}"
    return mean + (f" ± {statistics.stdev(found):.{digits}f}" if len(found) > 1 else "")


def markdown(
    header: Sequence[str], lines: Iterable[Sequence[str]], words: Collection[int] = range(1)
) -> str:
    """A table; columns that are not in `words` are numbers."""
    rule = ["---" if column in words else "---:" for column in range(len(header))]
    return "\n".join("| " + " | ".join(line) + " |" for line in (header, rule, *lines))
