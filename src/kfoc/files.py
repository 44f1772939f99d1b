"""Files and folders that are put in place as a whole, and tensors in them, with their checksums."""

from __future__ import annotations

import hashlib
import json
import os
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

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


def write_tensors(path: Place, key: str, text: str, tensors: Mapping[str, Tensor]) -> None:
    """A safetensors file with `text` under `key` in its header, and the checksum of all.

    Raises:
        ImportError: safetensors is not installed.
    """
    torch_format = safetensors_torch()
    # Each of its own memory: the format does not take tensors that share any.
    own = {name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}
    header = {key: text, "checksum": checksum(text, own)}
    with replacing(path) as temporary:
        torch_format.save_file(own, str(temporary), metadata=header)


def read_tensors(path: Place, mmap: bool = False) -> tuple[dict[str, str], dict[str, Tensor]]:
    """The header and the tensors of a safetensors file, on the CPU.

    Args:
        mmap: leave the tensors in the file, where they change with it.

    Raises:
        FileNotFoundError: there is no such file.
        ImportError: safetensors is not installed.
        ValueError: the file is damaged, or of another format.
    """
    with _opened(path) as file:
        found = {name: file.get_tensor(name) for name in list(file.keys())}
        header = file.metadata() or {}
    return header, found if mmap else {name: tensor.clone() for name, tensor in found.items()}


def checksum(text: str, tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of a text and of tensors on the CPU, with their names, dtypes and shapes."""
    digest = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"\0{name} {tensor.dtype} {tuple(tensor.shape)}\0".encode())
        if tensor.numel():
            digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


@contextmanager
def _opened(path: Place) -> Iterator[Any]:
    safetensors_torch()
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no file {str(path)!r}")
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="pt", device="cpu") as file:
            yield file
    except SafetensorError as error:
        raise ValueError(
            f"{str(path)!r} is damaged (truncated or altered), or no safetensors file: {error}"
        ) from error


def safetensors_torch() -> Any:
    """The module `safetensors.torch`. Raises ImportError with what to install."""
    try:
        from safetensors import torch as torch_format
    except ImportError as error:
        raise ImportError(
            "saving and loading needs the package safetensors: pip install kfoc[io]"
        ) from error
    return torch_format


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
    with _opened(path) as file:
        return (file.metadata() or {}).get("checksum", "")


def _synchronised_folder(folder: Path) -> None:
    """Have the system write to the disk which files a folder holds."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
