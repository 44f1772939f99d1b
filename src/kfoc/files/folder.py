"""A directory that belongs to one fit at a time, and files in it that are whole or not there."""

from __future__ import annotations

import hashlib
import io
import os
import pickle
import sys
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch

from kfoc.files.writing import replacing

MAGIC = b"kfoc checkpoint 1\n"
# Of directories that this process has claimed. A forked worker, which may outlive it, lets go.
_claims: set[int] = set()


def _let_go() -> None:
    while _claims:
        os.close(_claims.pop())


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go)


@contextmanager
def claimed(directory: Path) -> Iterator[None]:
    """The directory is this fit's until the context or the process ends, however that may be.

    What a fit that was killed had begun to write is removed. Where the system has no locks, the
    directory is not claimed: files are whole all the same.

    Raises:
        ValueError: another fit has claimed it.
    """
    if sys.platform == "win32":
        yield
        return
    import fcntl

    descriptor = os.open(directory, os.O_RDONLY)
    _claims.add(descriptor)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"checkpoint: another fit is using {str(directory)!r}, and a directory belongs to "
                "one at a time: wait until it has ended, or name another directory"
            ) from None
        except OSError:  # as on some network file systems
            pass
        else:
            for left in directory.glob("*.kfoc-tmp"):
                left.unlink()
        yield
    finally:
        if descriptor in _claims:
            _claims.remove(descriptor)
            os.close(descriptor)


class _Hashed:
    """A file that hashes what is written to it."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.digest = hashlib.sha256()

    def write(self, piece: Any) -> int:
        self.digest.update(piece)
        return self.file.write(piece)

    def flush(self) -> None:
        self.file.flush()


def write(path: Path, content: dict[str, Any]) -> None:
    """Put a file in the place of the one that is there, which stays until the new one is complete.

    A line that says what it is, the SHA-256 of the rest, and the rest: by `torch.save`.
    """
    name = f"{path.name}.{uuid.uuid4().hex}.kfoc-tmp"
    with replacing(path, name) as temporary, open(temporary, "rb+") as file:
        file.write(MAGIC + bytes(32))
        hashed = _Hashed(file)
        torch.save(content, hashed)  # type: ignore[arg-type]
        file.seek(len(MAGIC))
        file.write(hashed.digest.digest())


def read(path: Path) -> Any:
    """The content of a file that `write` wrote; tensors are where they were.

    Raises:
        ValueError: a file that is damaged, or no checkpoint.
    """
    with open(path, "rb") as file:
        start = file.read(len(MAGIC))
        digest, payload = file.read(32), file.read()
    if start != MAGIC:
        raise ValueError(f"checkpoint: {str(path)!r} is none of kfoc's: remove it to begin anew")
    if hashlib.sha256(payload).digest() != digest:
        raise ValueError(f"checkpoint: {str(path)!r} is damaged: remove it to begin anew")
    try:
        # Nothing in it is unpickled but plain containers, numbers and tensors.
        return torch.load(io.BytesIO(payload), weights_only=True)
    except (pickle.UnpicklingError, EOFError) as error:
        raise ValueError(f"checkpoint: {str(path)!r} is none of kfoc's: {error}") from error
