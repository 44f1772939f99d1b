"""Tensors in files, with their checksum."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kfoc.files.writing import Place, replacing


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


def read_tensors(path: Place, key: str, mmap: bool = False) -> tuple[str, dict[str, Tensor]]:
    """The text and the tensors of a file that `write_tensors` wrote, on the CPU.

    Args:
        mmap: leave the tensors in the file, where they change with it.

    Raises:
        FileNotFoundError: there is no such file.
        ImportError: safetensors is not installed.
        ValueError: the file is damaged, or of another kind.
    """
    with opened(path) as file:
        found = {name: file.get_tensor(name) for name in list(file.keys())}
        header = file.metadata() or {}
    if key not in header:
        raise ValueError(
            f"{str(path)!r} is a safetensors file of another kind: it has no {key!r} in its header"
        )
    if header.get("checksum") != checksum(header[key], found):
        raise ValueError(f"{str(path)!r} is damaged: its checksum does not fit what it holds")
    return header[key], found if mmap else {name: tensor.clone() for name, tensor in found.items()}


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
def opened(path: Place) -> Iterator[Any]:
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
