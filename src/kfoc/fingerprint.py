"""What tells one model, one configuration and one stream of batches from another, in few bytes."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import is_dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kfoc.encoding import held

# Of each tensor, so many entries at equal distances are looked at where not all are.
SAMPLE = 4096

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def sampled(tensor: Tensor) -> bytes:
    """The dtype, the shape, and the bytes of at most `SAMPLE` entries of a tensor, hashed."""
    digest = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
    if tensor.numel() and tensor.layout == torch.strided:
        flat = _bits(tensor).reshape(-1)
        step = math.ceil(len(flat) / SAMPLE)
        digest.update(flat[::step].cpu().contiguous().numpy().tobytes())
    return digest.digest()


def checksum(tensor: Tensor) -> str:
    """As `sampled`, and the sum of all entries' bits: exact, so in whatever order it is taken.

    Any change of a single entry shows. Exchanged entries show where the sample has one of them.
    """
    total = _bits(tensor).sum(dtype=torch.int64).item() if tensor.layout == torch.strided else 0
    return f"{sampled(tensor).hex()[:16]} {total}"


def _bits(tensor: Tensor) -> Tensor:
    """The entries of a tensor as integers of their size."""
    tensor = tensor.detach()
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor.resolve_conj())
    return tensor.resolve_neg().view(_INTEGERS[tensor.element_size()])


class Trail:
    """The batches of a pass so far, as one hash of a sample of the tensors in each.

    Numbers, strings and arrays in them count too; of anything else its type.
    """

    def __init__(self) -> None:
        self.digest = ""

    def add(self, batch: Any) -> None:
        total = hashlib.sha256(self.digest.encode())
        for part in _parts(batch):
            total.update(part)
        self.digest = total.hexdigest()


def _parts(value: Any) -> Iterator[bytes]:
    """What a batch is made of, in order."""
    if isinstance(value, Tensor):
        yield sampled(value)
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield repr(key).encode()
            yield from _parts(item)
    elif isinstance(value, (tuple, list)):
        yield f"({len(value)}".encode()
        for item in value:
            yield from _parts(item)
    elif is_dataclass(value) and not isinstance(value, type):
        yield from _parts(held(value))
    elif value is None or isinstance(value, (bool, int, float, str, bytes)):
        yield repr(value).encode()
    elif callable(getattr(value, "tobytes", None)) and hasattr(value, "reshape"):  # of NumPy
        step = max(1, math.ceil(value.size / SAMPLE))
        yield f"{value.dtype} {value.shape}".encode() + value.reshape(-1)[::step].tobytes()
    else:
        yield type(value).__qualname__.encode()


def described(value: Any, depth: int = 4) -> str:
    """A configuration in words that are the same in every process.

    Default representations have addresses in them, and sets have no order. Of what lies deeper than
    `depth`, and of functions, the name alone.
    """
    if isinstance(value, Tensor):
        return f"tensor {checksum(value)}"
    if value is None or isinstance(value, (bool, int, float, str, torch.dtype, torch.device)):
        return repr(value)
    if callable(value) and hasattr(value, "__qualname__"):
        return f"{value.__module__}.{value.__qualname__}"
    kind = type(value).__qualname__
    if depth == 0 or isinstance(value, nn.Module):
        return kind
    if isinstance(value, (set, frozenset)):
        return "{" + ", ".join(sorted(described(item, depth - 1) for item in value)) + "}"
    if isinstance(value, (list, tuple)):
        return "(" + ", ".join(described(item, depth - 1) for item in value) + ")"
    parts: Mapping[Any, Any] = {}
    if isinstance(value, Mapping):
        parts = value
    elif "__dataclass_fields__" in type(value).__dict__:
        parts = held(value)
    elif hasattr(value, "__dict__"):  # also of a class derived from a dataclass, without being one
        parts = (held(value) if is_dataclass(value) else {}) | vars(value)
    inside = ", ".join(f"{key}={described(item, depth - 1)}" for key, item in parts.items())
    return f"{kind}({inside})"


def of_model(model: nn.Module) -> dict[str, str]:
    """What a fit reads of a model: its tensors with their checksums, and the modules' modes."""
    tensors: Iterable[tuple[str, Tensor]] = [*model.named_parameters(), *model.named_buffers()]
    found = {}
    for name, tensor in tensors:
        trained = "trained " if tensor.requires_grad else ""
        shape = f"{tuple(tensor.shape)} on {tensor.device}"
        found[f"tensor {name!r}"] = f"{tensor.dtype} {trained}{shape}, {checksum(tensor)}"
    modes = "".join("t" if module.training else "e" for module in model.modules())
    kinds = " ".join(type(module).__qualname__ for module in model.modules())
    found["classes of the modules"] = hashlib.sha256(kinds.encode()).hexdigest()[:16]
    found["modes of the modules (train or eval)"] = hashlib.sha256(modes.encode()).hexdigest()[:16]
    return found


def differences(saved: Mapping[str, str], present: Mapping[str, str]) -> list[str]:
    """What is not the same, in words, both values included."""
    keys = [*present, *(key for key in saved if key not in present)]
    return [
        f"{key} was {saved.get(key, 'missing')} and is {present.get(key, 'missing')}"
        for key in keys
        if saved.get(key) != present.get(key)
    ]
