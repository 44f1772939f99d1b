"""The package's own objects as plain dicts, lists, numbers, strings and tensors, and back.

For `state_dict`s: what comes out goes through `torch.save` and `torch.load(weights_only=True)`.
Only classes of this package are rebuilt, field by field; nothing is called and nothing unpickled.
"""

from __future__ import annotations

import importlib
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor

_PACKAGE = __name__.split(".")[0]


def encoded(value: Any) -> Any:
    """A copy of `value` in plain terms; tensors stay tensors.

    Raises:
        ValueError: something that cannot be written down, such as a function.
    """
    if isinstance(value, Tensor):
        return value.detach().clone()
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, torch.dtype):
        return {"dtype": str(value).removeprefix("torch.")}
    if isinstance(value, list):
        return [encoded(item) for item in value]
    if type(value) in (tuple, torch.Size):
        return {"tuple": [encoded(item) for item in value]}
    if isinstance(value, dict):
        return {"items": [[encoded(key), encoded(item)] for key, item in value.items()]}
    kind = type(value)
    if kind.__module__.split(".")[0] != _PACKAGE or isinstance(value, type):
        raise ValueError(f"a state holds a {kind.__name__}, which cannot be saved")
    name = f"{kind.__module__}:{kind.__qualname__}"
    return {"object": name, "fields": {key: encoded(item) for key, item in _held(value).items()}}


def decoded(value: Any, device: torch.device | str) -> Any:
    """What `encoded` was given, with its tensors on `device` (copies, always).

    Raises:
        ValueError: not of this form, or of another version of the package.
    """
    if isinstance(value, Tensor):
        return value.detach().clone().to(device)
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, list):
        return [decoded(item, device) for item in value]
    if isinstance(value, dict):
        if value.keys() == {"dtype"}:
            return getattr(torch, value["dtype"])
        if value.keys() == {"tuple"}:
            return tuple(decoded(item, device) for item in value["tuple"])
        if value.keys() == {"items"}:
            return {decoded(k, device): decoded(item, device) for k, item in value["items"]}
        if value.keys() == {"object", "fields"}:
            held = {key: decoded(item, device) for key, item in value["fields"].items()}
            return _rebuilt(_class(value["object"]), held)
    raise ValueError(f"this is no state of {_PACKAGE}: found a {type(value).__name__} in it")


def _held(value: Any) -> dict[str, Any]:
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


def _rebuilt(kind: type, held: dict[str, Any]) -> Any:
    if issubclass(kind, tuple):
        return kind(**held)
    value = object.__new__(kind)
    value.__dict__.update(held)
    return value
