"""One file for a curvature: tensors in the safetensors format, everything else as JSON in it.

Nothing is ever unpickled, so a file from anyone can be read.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from kfoc.blocks import KINDS, Block, Report
from kfoc.blocks.decomposed import DecomposedBlock
from kfoc.blocks.spectrum import Spectrum
from kfoc.errors import naming
from kfoc.files.hints import check, check_all, declared
from kfoc.files.tensors import read_tensors, write_tensors
from kfoc.files.writing import Place
from kfoc.parameters.layout import Layout

VERSION = 1
KEY = "kfoc"
# The curvature's own entries, and the types that they must have.
METADATA = {
    "num_samples": "int",
    "skipped": "dict[str, str]",
    "estimator": "str",
    "fisher": "str",
    "seed": "int | None",
    "counts": "dict",
}


@dataclass(frozen=True)
class Stored:
    """What is in a file: blocks, their layouts, and the entries of `METADATA`."""

    blocks: dict[str, Block]
    layouts: dict[str, Layout]
    metadata: dict[str, Any]


def write(path: Place, stored: Stored, factorised: bool = False) -> None:
    """Write the file as a whole, or leave what was there.

    Args:
        factorised: with the blocks' eigendecompositions; readers that know of none pass over them.

    Raises:
        FileNotFoundError: the folder does not exist.
        ImportError: safetensors is not installed.
        ValueError: a block that `read` would refuse, or that cannot be factorised.
    """
    tensors: dict[str, Tensor] = {}
    layers = []
    for number, (name, block) in enumerate(stored.blocks.items()):
        layout = asdict(stored.layouts[name])
        with naming(name):
            entry = _taken(block, f"{number}", tensors, factorised)
        _check(name, block)
        layers.append({"name": name, "layout": layout, "block": entry})
    content = {"version": VERSION, "layers": layers, **stored.metadata}
    write_tensors(path, KEY, json.dumps(content), tensors)


def read(path: Place, mmap: bool = False) -> Stored:
    """Read a file that `write` wrote, onto the CPU; `mmap` as for `read_tensors`.

    Raises:
        FileNotFoundError: there is no such file.
        ImportError: safetensors is not installed.
        ValueError: the file is damaged, of another format, or of a newer version.
    """
    text, tensors = read_tensors(path, KEY, mmap)
    content = _content(path, text)
    version = content.get("version")
    if type(version) is not int or version < 1:  # a bool is an int too
        raise ValueError(f"{str(path)!r} is damaged: its version of the format is {version!r}")
    if version > VERSION:
        raise ValueError(
            f"{str(path)!r} has version {version} of the format, and this kfoc reads up to "
            f"{VERSION}: update kfoc"
        )
    try:
        return _restored(content, tensors)
    except (LookupError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise ValueError(f"{str(path)!r} is damaged or not a curvature: {error}") from error


def _content(path: Place, text: str) -> dict[str, Any]:
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:  # also of numbers that are too long
        raise ValueError(f"{str(path)!r} is damaged: its description is no JSON") from error
    if not isinstance(content, dict):
        raise ValueError(f"{str(path)!r} is damaged: its description is no JSON object")
    return content


def _taken(block: Block, key: str, tensors: dict[str, Tensor], factorised: bool) -> dict[str, Any]:
    """Describe a block, and put its tensors among `tensors` under keys that begin with `key`."""
    entry: dict[str, Any] = {"kind": type(block).__name__, "report": asdict(block.report)}
    if KINDS.get(entry["kind"]) is not type(block):
        raise ValueError(f"blocks of the kind {entry['kind']} cannot be saved")
    parts: dict[str, Any] = {}
    for name, value in block.parts().items():
        inside = f"{key}.{name}"
        if isinstance(value, Tensor):
            tensors[inside] = value
            parts[name] = {"tensor": inside}
        elif isinstance(value, tuple) and value and isinstance(value[0], Block):
            each = [
                _taken(item, f"{inside}.{k}", tensors, factorised) for k, item in enumerate(value)
            ]
            parts[name] = {"blocks": each}
        else:
            parts[name] = {"value": list(value) if isinstance(value, tuple) else value}
    if factorised and isinstance(block, DecomposedBlock):
        spectrum = {f"{key}.spectrum.{k}": part for k, part in block.spectrum().parts().items()}
        tensors.update(spectrum)
        entry["spectrum"] = list(spectrum)
    return {**entry, "parts": parts}


def _restored(content: dict[str, Any], tensors: Mapping[str, Tensor]) -> Stored:
    metadata = {name: content.get(name) for name in METADATA}
    check_all(metadata, METADATA)
    if content["num_samples"] < 1:
        raise ValueError(f"num_samples is {content['num_samples']}")
    blocks: dict[str, Block] = {}
    layouts: dict[str, Layout] = {}
    for layer in content["layers"]:
        name = layer["name"]
        if not isinstance(name, str) or name in blocks:
            raise ValueError(f"layer {name!r} is there twice, or has no name")
        layouts[name] = _layout(name, layer["layout"])
        with naming(name):
            blocks[name] = _given(layer["block"], tensors)
        _check(name, blocks[name])
        if blocks[name].shape != layouts[name].shape:
            raise ValueError(
                f"layer {name!r} has a block of shape {blocks[name].shape} for parameters of "
                f"shape {layouts[name].shape}"
            )
    return Stored(blocks, layouts, metadata)


def _layout(layer: str, entry: dict[str, Any]) -> Layout:
    names, shapes = tuple(entry["names"]), tuple(map(tuple, entry["shapes"]))
    sizes = [entry["groups"], *(size for shape in shapes for size in shape)]
    if not all(isinstance(name, str) for name in names) or len(names) != len(shapes):
        raise ValueError(f"layer {layer!r} has parameters {names!r} of shapes {shapes}")
    if not all(type(size) is int and size >= 0 for size in sizes):
        raise ValueError(f"layer {layer!r} has parameters of shapes {shapes!r}")
    return Layout(names, shapes, entry["kind"], entry["groups"])


def _check(layer: str, block: Block) -> None:
    """Raise where the tensors of a block make none, or do not fit each other."""
    try:
        block.check()
    except ValueError as error:
        raise ValueError(
            f"the block of layer {layer!r} is no {type(block).__name__}: {error}"
        ) from error
    shadow = block.to("meta")  # a product without numbers tells
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
    report = Report(**entry["report"])
    check(vars(report), declared(Report))
    block = KINDS[entry["kind"]](**fields, report=report)
    if "spectrum" in entry:
        _keep(block, {key.rpartition(".")[-1]: tensors[key] for key in entry["spectrum"]})
    return block


def _keep(block: Block, parts: Mapping[str, Tensor]) -> None:
    """Give a block the eigendecomposition that was saved with it."""
    if not isinstance(block, DecomposedBlock):
        raise ValueError(f"a {type(block).__name__} has no eigendecomposition to be saved")
    try:
        spectrum = Spectrum.of_parts(parts)
        block.check_spectrum(spectrum)
    except (LookupError, RuntimeError, ValueError) as error:
        raise ValueError(f"its eigendecomposition is damaged: {error}") from error
    block.keep(spectrum)
