"""The package's own objects as plain dicts, lists, numbers, strings and tensors, and back.

For `state_dict`s and checkpoints: what comes out goes through `torch.save` and, with
`weights_only=True`, `torch.load`. Only classes of this package are rebuilt, field by field; nothing
is called and nothing unpickled.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor

_PACKAGE = __name__.split(".")[0]


def copied(tensor: Tensor) -> Tensor:
    return tensor.detach().clone()


def written(tensor: Tensor) -> Tensor:
    """The tensor itself where writing it down takes little more than its numbers; else a copy.

    What is written of a view is all the memory that it is a view of. Strides are kept, which decide
    in which order some sums are taken; a copy closes the gaps between them, no more.
    """
    tensor = tensor.detach()
    needed = tensor.numel() * tensor.element_size()
    return tensor if tensor.untyped_storage().nbytes() <= 2 * needed + 64 else tensor.clone()


def encoded(value: Any, take: Callable[[Tensor], Tensor] = copied) -> Any:
    """`value` in plain terms; tensors stay tensors: copies, or what else `take` makes of them.

    Raises:
        ValueError: something that cannot be written down, such as a function.
    """
    if isinstance(value, Tensor):
        return take(value)
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, torch.dtype):
        return {"dtype": str(value).removeprefix("torch.")}
    if isinstance(value, list):
        return [encoded(item, take) for item in value]
    if type(value) in (tuple, torch.Size):
        return {"tuple": [encoded(item, take) for item in value]}
    if type(value) in (set, frozenset):
        return {type(value).__name__: [encoded(item, take) for item in value]}
    if isinstance(value, dict):
        return {"items": [[encoded(k, take), encoded(item, take)] for k, item in value.items()]}
    kind = type(value)
    if kind.__module__.split(".")[0] != _PACKAGE or isinstance(value, type):
        raise ValueError(f"a state holds a {kind.__name__}, which cannot be saved")
    name = f"{kind.__module__}:{kind.__qualname__}"
    return {"object": name, "fields": {k: encoded(item, take) for k, item in held(value).items()}}


def decoded(value: Any, device: torch.device | str | None) -> Any:
    """What `encoded` was given, with copies of its tensors on `device`; None: the tensors there.

    Raises:
        ValueError: not of this form, or of another version of the package.
    """
    if isinstance(value, Tensor):
        return value if device is None else value.detach().clone().to(device)
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, list):
        return [decoded(item, device) for item in value]
    if isinstance(value, dict):
        if value.keys() == {"dtype"}:
            return getattr(torch, value["dtype"])
        if value.keys() == {"tuple"}:
            return tuple(decoded(item, device) for item in value["tuple"])
        if value.keys() == {"set"}:
            return {decoded(item, device) for item in value["set"]}
        if value.keys() == {"frozenset"}:
            return frozenset(decoded(item, device) for item in value["frozenset"])
        if value.keys() == {"items"}:
            return {decoded(k, device): decoded(item, device) for k, item in value["items"]}
        if value.keys() == {"object", "fields"}:
            parts = {key: decoded(item, device) for key, item in value["fields"].items()}
            return _rebuilt(_class(value["object"]), parts)
    raise ValueError(f"this is no state of {_PACKAGE}: found a {type(value).__name__} in it")


def held(value: Any) -> dict[str, Any]:
    """What an object is made of; of dataclasses not what they have cached beside it."""
    if hasattr(value, "_fields"):
        return value._asdict()
    if is_dataclass(value):
        return {field.name: getattr(value, field.name) for field in fields(value)}
    return dict(vars(value))


def _class(name: str) -> type:
    module, _, qualified = name.partition(":")
    found: Any = None
    if module.split(".")[0] == _PACKAGE:
        try:
            found = getattr(importlib.import_module(module), qualified, None)
        except ImportError:
            found = None
    if not isinstance(found, type) or found.__module__ != module:
        raise ValueError(
            f"the state holds a {name!r}, which this version of {_PACKAGE} does not have: load it "
            "with the version that saved it"
        )
    return found


def _rebuilt(kind: type, parts: dict[str, Any]) -> Any:
    if issubclass(kind, tuple):
        return kind(**parts)
    value = object.__new__(kind)
    value.__dict__.update(parts)
    return value
