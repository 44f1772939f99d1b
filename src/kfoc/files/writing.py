"""Files that are put in place as a whole."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

Place = str | os.PathLike[str]


@contextmanager
def replacing(path: Place, name: str | None = None) -> Iterator[Path]:
    """A file beside `path` to write to, which takes its place when it is complete.

    Until then, and where anything fails, what was there stays, and nothing beside it.

    Args:
        name: of the file beside it, which must be one that no other has.

    Raises:
        FileNotFoundError: the folder does not exist.
    """
    target = Path(path)
    if not target.parent.is_dir():
        raise FileNotFoundError(f"there is no folder {str(target.parent)!r} to write into")
    # Beside its place, so that the move stays within one file system and is atomic.
    temporary = target.with_name(name or f".{uuid.uuid4().hex}.tmp")
    open(temporary, "xb").close()  # refuses what is there, so that no planted link is followed
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
    if os.name == "posix":
        _synchronised_folder(target.parent)


def write_text(path: Place, text: str) -> None:
    """The file has either its old or its new content, whenever the process is stopped."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="")


def _synchronised_folder(folder: Path) -> None:
    """Have the system write to the disk which files a folder holds."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
