"""The package's own objects as plain dicts, lists, numbers, strings and tensors, and back.

For `state_dict`s and checkpoints: what comes out goes through `torch.save` and, with
`weights_only=True`, `torch.load`. Only classes that `kinds` has a name for are rebuilt, field by
field; nothing is called and nothing unpickled.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor

from kfoc.files.hints import check, declared
from kfoc.files.kinds import KINDS

_PACKAGE = __name__.split(".")[0]
_DTYPES = {
    str(value).removeprefix("torch."): value
    for value in vars(torch).values()
    if isinstance(value, torch.dtype)
}
_NAMES = {place: name for name, place in KINDS.items()}
_CONTAINERS = {"tuple": tuple, "set": set, "frozenset": frozenset}


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
    package, _, module = kind.__module__.partition(".")
    name = _NAMES.get(f"{module}:{kind.__qualname__}") if package == _PACKAGE else None
    if name is None or isinstance(value, type):
        raise ValueError(f"a state holds a {kind.__name__}, which cannot be saved: it has no name")
    return {"object": name, "fields": {k: encoded(item, take) for k, item in held(value).items()}}


def decoded(value: Any, device: torch.device | str | None) -> Any:
    """What `encoded` was given, with copies of its tensors on `device`; None: the tensors there.

    Raises:
        ValueError: not of this form, or of another version of the package.
    """
    try:
        return _decoded(value, device)
    except (TypeError, RecursionError) as error:  # as of a list for a key
        raise ValueError(f"this is no state of {_PACKAGE}: {error}") from error


def _decoded(value: Any, device: torch.device | str | None) -> Any:
    if isinstance(value, Tensor):
        return value if device is None else value.detach().clone().to(device)
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, list):
        return [_decoded(item, device) for item in value]
    if isinstance(value, dict) and len(value) == 1:
        ((form, inside),) = value.items()
        if form == "dtype" and inside in _DTYPES:
            return _DTYPES[inside]
        if form in _CONTAINERS and isinstance(inside, list):
            return _CONTAINERS[form](_decoded(item, device) for item in inside)
        if form == "items" and isinstance(inside, list) and all(map(_is_pair, inside)):
            return {_decoded(k, device): _decoded(item, device) for k, item in inside}
    if isinstance(value, dict) and value.keys() == {"object", "fields"}:
        fields_ = value["fields"]
        if isinstance(value["object"], str) and isinstance(fields_, dict):
            parts = {key: _decoded(item, device) for key, item in fields_.items()}
            return _rebuilt(_class(value["object"]), parts)
    found = repr(value)[:60] if isinstance(value, dict) else f"a {type(value).__name__}"
    raise ValueError(f"this is no state of {_PACKAGE}: found {found} in it")


def _is_pair(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2


def held(value: Any) -> dict[str, Any]:
    """What an object is made of; of dataclasses not what they have cached beside it."""
    if hasattr(value, "_fields"):
        return value._asdict()
    if is_dataclass(value):
        return {field.name: getattr(value, field.name) for field in fields(value)}
    return dict(vars(value))


def _class(name: str) -> type:
    module, _, qualified = KINDS.get(name, "").partition(":")
    # Nothing is imported for a name in a file: what makes states is there already.
    found = getattr(sys.modules.get(f"{_PACKAGE}.{module}"), qualified, None)
    if not isinstance(found, type):
        raise ValueError(
            f"the state holds a {name!r}, which this version of {_PACKAGE} does not have: load it "
            "with the version that saved it"
        )
    return found


def _rebuilt(kind: type, parts: dict[str, Any]) -> Any:
    hints = declared(kind)
    whole = is_dataclass(kind) or issubclass(kind, tuple)
    # Of other classes, what has a value without being set (or is made when needed) may be missing.
    missing = [name for name in hints if name not in parts and (whole or not hasattr(kind, name))]
    try:
        if missing or not hints:
            raise ValueError(f"there is no {missing[0]!r}" if missing else "it holds nothing")
        check(parts, hints)
    except ValueError as error:
        raise ValueError(f"the state holds a {kind.__qualname__} in which {error}") from None
    if issubclass(kind, tuple):
        return kind(**parts)
    value = object.__new__(kind)
    value.__dict__.update(parts)
    return value
