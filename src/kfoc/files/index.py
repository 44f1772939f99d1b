"""Folders of files that are of one save, by an index."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kfoc.files.tensors import checksum, opened
from kfoc.files.writing import write_text


@contextmanager
def saving(index: Path, files: list[str]) -> Iterator[None]:
    """Where a save fails inside, remove its `files` but those that the index has already."""
    try:
        yield
    except BaseException:
        kept = index.read_text(encoding="utf-8") if index.is_file() else ""
        for name in files:
            if name not in kept:
                (index.parent / name).unlink(missing_ok=True)
        raise


def write_index(index: Path, files: Iterable[str], content: dict[str, Any], pattern: str) -> None:
    """Put one save of a folder in the place of the one before it, in a single step.

    Until the index is there, the folder is that of the save before; then the files of that one go.

    Args:
        files: those of this save, which are there already, under names that no other save has.
        content: what else the index is to hold.
        pattern: of the names of all such files.
    """
    sums = {name: _stored_checksum(index.parent / name) for name in files}
    text = json.dumps({**content, "files": sums})
    write_text(index, json.dumps({"content": text, "checksum": checksum(text, {})}))
    for file in index.parent.glob(pattern):
        if file.name not in sums:
            file.unlink(missing_ok=True)


def read_index(index: Path) -> dict[str, Any]:
    """The content of an index, whose files are there and of the same save.

    Raises:
        FileNotFoundError: the index, or a file, is not there.
        ValueError: an index that is damaged, or a file that is not of this save.
    """
    folder = index.parent
    if not index.is_file():
        raise FileNotFoundError(f"{str(folder)!r} has no {index.name}: nothing was saved there")
    try:
        outer = json.loads(index.read_text(encoding="utf-8"))
        if checksum(outer["content"], {}) != outer["checksum"]:
            raise ValueError("its checksum does not fit what it holds")
        content: dict[str, Any] = json.loads(outer["content"])
        files: dict[str, str] = content["files"]
        missing = [name for name in files if not (folder / name).is_file()]
    except (LookupError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise ValueError(f"{str(index)!r} is damaged: {error}") from error
    if missing:
        raise FileNotFoundError(f"{str(folder)!r} lacks {missing}, of the save that it holds")
    for name, expected in files.items():
        if _stored_checksum(folder / name) != expected:
            raise ValueError(
                f"{str(folder / name)!r} is of another save than {index.name} beside it: copy the "
                "folder of one save as a whole"
            )
    return content


def _stored_checksum(path: Path) -> str:
    """What the header of a file says: it tells files apart that are each in order."""
    with opened(path) as file:
        return (file.metadata() or {}).get("checksum", "")
