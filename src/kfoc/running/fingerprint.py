"""What tells one model, one configuration and one stream of batches from another, in few bytes."""

from __future__ import annotations

import hashlib
import importlib
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import is_dataclass
from functools import partial
from types import CodeType
from typing import Any

import torch
from torch import Tensor, nn

from kfoc.files.encoding import held
from kfoc.fitting.session import Session

# Of each tensor, so many entries at equal distances are looked at where not all are.
SAMPLE = 4096

_PLAIN = (bool, int, float, complex, str, bytes, torch.dtype, torch.device)
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
    `depth`, the name alone; of functions the name and the code.
    """
    if isinstance(value, Tensor):
        return f"tensor {checksum(value)}"
    if value is None or isinstance(value, _PLAIN):
        return repr(value)
    if callable(value) and hasattr(value, "__qualname__"):
        return f"{value.__module__}.{value.__qualname__} {code_of(value)}"
    if isinstance(value, partial):
        return f"partial{described((value.func, value.args, value.keywords), depth)}"
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


def code_of(value: Any) -> str:
    """What a callable runs, hashed; nothing where it is not Python's.

    The same function defined anew, in another process or at another place, has the same code; what
    it holds (closures, defaults, the arguments of a `partial`) is left out: a rank may have its own
    device or counter there.
    """
    if isinstance(value, partial):
        return code_of(value.func)
    called = value if hasattr(value, "__code__") else type(value).__call__
    code = getattr(called, "__code__", None)
    if code is None:
        return ""
    return f"of code {hashlib.sha256(_code(code).encode()).hexdigest()[:16]}"


def _code(code: CodeType) -> str:
    """Instructions, names and constants, without the places that they were written at."""
    constants = [_code(c) if isinstance(c, CodeType) else described(c) for c in code.co_consts]
    return repr((code.co_code, code.co_names, code.co_freevars, constants))


def of_task(session: Session) -> dict[str, str]:
    """All that the numbers of a fit depend on, but the data, of a session before its first batch.

    Which layers there are is the session's: it follows from the model and what was asked for.
    """
    package = importlib.import_module(__name__.partition(".")[0])
    task, selection = session.task, session.selection
    return {
        "kfoc": package.__version__,
        "torch": str(torch.__version__),
        "estimator": described(task.estimator),
        "likelihood": described(task.likelihood),
        "fisher": task.fisher,
        "mc_samples": str(task.mc_samples),
        "probes": str(task.probes),
        "seed": str(task.seed),
        "verify": str(task.verify),
        "predict": described(task.predict),
        "layers": ", ".join(map(repr, selection.blocks)),
        "layers asked for by name": ", ".join(map(repr, sorted(selection.named))),
    } | of_model(task.model)


def of_model(model: nn.Module) -> dict[str, str]:
    """What a fit reads of a model: its tensors with their checksums, the modules and their modes.

    Of tensors of which each rank has a part (`fully_shard`), what all ranks know.
    """
    tensors: Iterable[tuple[str, Tensor]] = [*model.named_parameters(), *model.named_buffers()]
    found = {}
    for name, tensor in tensors:
        trained = "trained " if tensor.requires_grad else ""
        values = "in parts" if hasattr(tensor, "device_mesh") else checksum(tensor)
        found[f"tensor {name!r}"] = f"{tensor.dtype} {trained}{tuple(tensor.shape)}, {values}"
    found["devices"] = ", ".join(sorted({str(tensor.device) for _, tensor in tensors}))
    modes = "".join("t" if module.training else "e" for module in model.modules())
    kinds = " ".join(map(_configured, model.modules()))
    found["the modules' classes and options"] = hashlib.sha256(kinds.encode()).hexdigest()[:16]
    digest = hashlib.sha256(modes.encode()).hexdigest()[:16]
    known = {"t": "train", "e": "eval"}
    every = known[modes[0]] if len(set(modes)) == 1 else f"some of either, {digest}"
    found["modes of the modules (train or eval)"] = every
    return found


def _configured(module: nn.Module) -> str:
    """A module's class, with what torch's own say of their options (strides, eps, rates)."""
    kind = type(module)
    # Containers' say where their parameters lie, which need not be the same for all ranks.
    ours = kind.__module__.startswith("torch.nn.") and not kind.__module__.endswith("container")
    return f"{kind.__qualname__}({module.extra_repr() if ours else ''})"


def differences(saved: Mapping[str, str], present: Mapping[str, str]) -> list[str]:
    """What is not the same, in words, both values included."""
    keys = [*present, *(key for key in saved if key not in present)]
    return [
        f"{key} was {saved.get(key, 'missing')} and is {present.get(key, 'missing')}"
        for key in keys
        if saved.get(key) != present.get(key)
    ]
