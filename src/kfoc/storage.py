"""One file for a curvature: tensors in the safetensors format, everything else as JSON in it.

Nothing is ever unpickled, so a file from anyone can be read.
"""

from __future__ import annotations

import hashlib
import json
import os
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kfoc.blocks import KINDS, Block, Report
from kfoc.layout import Layout

VERSION = 1
KEY = "kfoc"
# The curvature's own entries, and the types that they must have.
METADATA: dict[str, tuple[type, ...]] = {
    "num_samples": (int,),
    "skipped": (dict,),
    "estimator": (str,),
    "fisher": (str,),
    "seed": (int, type(None)),
    "counts": (dict,),
}


@dataclass(frozen=True)
class Stored:
    """What is in a file: blocks, their layouts, and the entries of `METADATA`."""

    blocks: dict[str, Block]
    layouts: dict[str, Layout]
    metadata: dict[str, Any]


def write(path: str | os.PathLike[str], stored: Stored) -> None:
    """Write the file as a whole, or leave what was there.

    Raises:
        FileNotFoundError: the folder does not exist.
        ImportError: safetensors is not installed.
    """
    torch_format = safetensors_torch()
    target = Path(path)
    if not target.parent.is_dir():
        raise FileNotFoundError(f"there is no folder {str(target.parent)!r} to write into")
    tensors: dict[str, Tensor] = {}
    layers = []
    for number, (name, block) in enumerate(stored.blocks.items()):
        layout = asdict(stored.layouts[name])
        layers.append(
            {"name": name, "layout": layout, "block": _taken(block, f"{number}", tensors)}
        )
    content = {"version": VERSION, "layers": layers, **stored.metadata}
    text = json.dumps(content)
    header = {KEY: text, "checksum": _checksum(text, tensors)}
    # Beside its place, so that the move stays within one file system and is atomic.
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex}.tmp")
    try:
        torch_format.save_file(tensors, str(temporary), metadata=header)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
    if os.name == "posix":
        _synchronised_folder(target.parent)


def read(path: str | os.PathLike[str]) -> Stored:
    """Read a file that `write` wrote, onto the CPU.

    Raises:
        FileNotFoundError: there is no such file.
        ImportError: safetensors is not installed.
        ValueError: the file is damaged, of another format, or of a newer version.
    """
    safetensors_torch()
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no file {str(path)!r}")
    header, tensors = _opened(path)
    if KEY not in header:
        raise ValueError(
            f"{str(path)!r} is a safetensors file, but not of a curvature: write it with "
            "Curvature.save"
        )
    content = _content(path, header[KEY])
    version = content.get("version")
    if type(version) is not int or version < 1:  # a bool is an int too
        raise ValueError(f"{str(path)!r} is damaged: its version of the format is {version!r}")
    if version > VERSION:
        raise ValueError(
            f"{str(path)!r} has version {version} of the format, and this kfoc reads up to "
            f"{VERSION}: update kfoc"
        )
    if header.get("checksum") != _checksum(header[KEY], tensors):
        _explain(path, content, tensors)
        raise ValueError(f"{str(path)!r} is damaged: its checksum does not fit what it holds")
    try:
        return _restored(content, tensors)
    except (LookupError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise ValueError(f"{str(path)!r} is damaged or not a curvature: {error}") from error


def safetensors_torch() -> Any:
    """The module `safetensors.torch`. Raises ImportError with what to install."""
    try:
        from safetensors import torch as torch_format
    except ImportError as error:
        raise ImportError(
            "saving and loading needs the package safetensors: pip install kfoc[io]"
        ) from error
    return torch_format


def _opened(path: str | os.PathLike[str]) -> tuple[dict[str, str], dict[str, Tensor]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="pt", device="cpu") as file:
            names = list(file.keys())
            return file.metadata() or {}, {name: file.get_tensor(name) for name in names}
    except SafetensorError as error:
        raise ValueError(
            f"{str(path)!r} is damaged (truncated or altered), or no safetensors file: {error}"
        ) from error


def _content(path: str | os.PathLike[str], text: str) -> dict[str, Any]:
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:  # also of numbers that are too long
        raise ValueError(f"{str(path)!r} is damaged: its description is no JSON") from error
    if not isinstance(content, dict):
        raise ValueError(f"{str(path)!r} is damaged: its description is no JSON object")
    return content


def _synchronised_folder(folder: Path) -> None:
    """Have the system write to the disk which files a folder holds."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _checksum(text: str, tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"\0{name} {tensor.dtype} {tuple(tensor.shape)}\0".encode())
        if tensor.numel():
            digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _taken(block: Block, key: str, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Describe a block, and put its tensors among `tensors` under keys that begin with `key`."""
    entry: dict[str, Any] = {"kind": type(block).__name__, "report": asdict(block.report)}
    if KINDS.get(entry["kind"]) is not type(block):
        raise ValueError(f"blocks of the kind {entry['kind']} cannot be saved")
    parts: dict[str, Any] = {}
    for name, value in block.parts().items():
        inside = f"{key}.{name}"
        if isinstance(value, Tensor):
            # Of its own memory: the format does not take tensors that share any.
            tensors[inside] = value.detach().cpu().contiguous().clone()
            parts[name] = {"tensor": inside, "shape": list(value.shape), "dtype": str(value.dtype)}
        elif isinstance(value, tuple) and value and isinstance(value[0], Block):
            each = [_taken(item, f"{inside}.{k}", tensors) for k, item in enumerate(value)]
            parts[name] = {"blocks": each}
        else:
            parts[name] = {"value": list(value) if isinstance(value, tuple) else value}
    return {**entry, "parts": parts}


def _restored(content: dict[str, Any], tensors: Mapping[str, Tensor]) -> Stored:
    for name, types in METADATA.items():
        if type(content.get(name)) not in types:
            raise ValueError(f"{name} is {content.get(name)!r}")
    if content["num_samples"] < 1:
        raise ValueError(f"num_samples is {content['num_samples']}")
    if not all(isinstance(reason, str) for reason in content["skipped"].values()):
        raise ValueError("skipped has a reason that is no text")
    blocks: dict[str, Block] = {}
    layouts: dict[str, Layout] = {}
    for layer in content["layers"]:
        name, layout = layer["name"], layer["layout"]
        if not isinstance(name, str) or name in blocks:
            raise ValueError(f"layer {name!r} is there twice, or has no name")
        shapes = tuple(tuple(shape) for shape in layout["shapes"])
        layouts[name] = Layout(tuple(layout["names"]), shapes, layout["kind"], layout["groups"])
        blocks[name] = _given(layer["block"], tensors)
        if blocks[name].shape != layouts[name].shape:
            raise ValueError(
                f"layer {name!r} has a block of shape {blocks[name].shape} for parameters of "
                f"shape {layouts[name].shape}"
            )
        _check_consistent(name, blocks[name])
    return Stored(blocks, layouts, {name: content[name] for name in METADATA})


def _check_consistent(layer: str, block: Block) -> None:
    """Raise where the tensors of a block do not fit each other: a product without numbers tells."""
    shadow = block.to("meta")
    try:
        shadow.matvec(torch.empty(block.shape, dtype=block.dtype, device="meta"))
    except RuntimeError as error:
        raise ValueError(f"the tensors of layer {layer!r} do not fit each other") from error


def _given(entry: dict[str, Any], tensors: Mapping[str, Tensor]) -> Block:
    if entry["kind"] not in KINDS:
        raise ValueError(f"unknown kind of block {entry['kind']!r}")
    fields: dict[str, Any] = {}
    for name, part in entry["parts"].items():
        if "tensor" in part:
            fields[name] = tensors[part["tensor"]]
        elif "blocks" in part:
            inside = [item["kind"] for item in part["blocks"]]
            if entry["kind"] in inside:  # what a hundred levels cost is two to their power
                raise ValueError(f"a {entry['kind']} inside of another")
            fields[name] = tuple(_given(item, tensors) for item in part["blocks"])
        else:
            value = part["value"]
            fields[name] = tuple(value) if isinstance(value, list) else value
    return KINDS[entry["kind"]](**fields, report=Report(**entry["report"]))


def _explain(
    path: str | os.PathLike[str], content: dict[str, Any], tensors: Mapping[str, Tensor]
) -> None:
    """Raise with the tensor that is missing or of another shape than described, if one is."""
    for part in _described_tensors(content):
        name = str(part["tensor"])
        if name not in tensors:
            raise ValueError(f"{str(path)!r} is damaged: the tensor {name!r} is missing")
        found = list(tensors[name].shape), str(tensors[name].dtype)
        if found != (part.get("shape"), part.get("dtype")):
            raise ValueError(
                f"{str(path)!r} is damaged: the tensor {name!r} should have the shape "
                f"{part.get('shape')} in {part.get('dtype')}, found {found[0]} in {found[1]}"
            )


def _described_tensors(node: Any) -> Iterator[dict[str, Any]]:
    if isinstance(node, dict):
        if "tensor" in node:
            yield node
            return
        node = list(node.values())
    if isinstance(node, list):
        for item in node:
            yield from _described_tensors(item)
