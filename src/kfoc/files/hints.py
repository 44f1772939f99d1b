"""Whether values are what annotations say: of what is read from files."""

from __future__ import annotations

import ast
import inspect
import sys
from collections.abc import Mapping
from dataclasses import is_dataclass
from functools import cache, cached_property
from typing import Any, get_args, get_origin

import torch
from torch import Tensor

_PACKAGE = __name__.split(".")[0]
_NAMED: dict[str, tuple[type, ...]] = {
    "Tensor": (Tensor,),
    "object": (object,),
    "bool": (bool,),
    "int": (int,),
    "float": (float, int),
    "str": (str,),
    "tuple": (tuple,),
    "list": (list,),
    "dict": (dict,),
    "set": (set,),
    "frozenset": (frozenset,),
    "dtype": (torch.dtype,),
}


@cache
def declared(kind: type) -> dict[str, tuple[str, Mapping[str, Any]]]:
    """Attribute -> its annotation, and what the names in that mean; of a class and its bases.

    What a class makes when it is first needed (`cached_property`) is one, but of dataclasses.
    """
    found: dict[str, tuple[str, Mapping[str, Any]]] = {}
    for base in reversed(kind.__mro__):
        scope = vars(sys.modules[base.__module__])
        for name, hint in inspect.get_annotations(base).items():
            found[name] = str(getattr(hint, "__forward_arg__", hint)), scope
        for name, made in vars(base).items():
            if isinstance(made, cached_property) and not is_dataclass(kind):
                found[name] = inspect.get_annotations(made.func)["return"], scope
    return found


def fits(value: Any, hint: str, scope: Mapping[str, Any]) -> bool:
    """Whether a value is what an annotation says, with all that containers hold."""
    return _fits(value, ast.parse(hint, mode="eval").body, scope)


def _fits(value: Any, hint: ast.expr, scope: Mapping[str, Any]) -> bool:
    if isinstance(hint, ast.BinOp):
        return _fits(value, hint.left, scope) or _fits(value, hint.right, scope)
    if isinstance(hint, ast.Constant):
        return value is hint.value  # None
    if isinstance(hint, ast.Subscript):
        inside = hint.slice.elts if isinstance(hint.slice, ast.Tuple) else [hint.slice]
        return _fits(value, hint.value, scope) and _all_fit(value, inside, scope)
    name = hint.attr if isinstance(hint, ast.Attribute) else getattr(hint, "id", "")
    if name == "Any":  # the state of another: never a number or a text by itself
        return not isinstance(value, (int, float, str))
    if name in _NAMED:
        boolean = isinstance(value, bool) and name in ("int", "float")
        return isinstance(value, _NAMED[name]) and not boolean
    kind = scope.get(name)
    if isinstance(kind, type) and not getattr(kind, "_is_protocol", False):
        return isinstance(value, kind)
    origin = get_origin(kind)
    if isinstance(origin, type) and origin.__module__ == "builtins":
        return isinstance(value, origin)
    if all(isinstance(one, str) for one in get_args(kind)) and get_args(kind):  # Literal
        return value in get_args(kind)
    return type(value).__module__.split(".")[0] == _PACKAGE  # a protocol, or one of several


def _all_fit(value: Any, inside: list[ast.expr], scope: Mapping[str, Any]) -> bool:
    if isinstance(value, dict):
        return all(
            _fits(key, inside[0], scope) and _fits(item, inside[1], scope)
            for key, item in value.items()
        )
    last = inside[-1]
    if isinstance(value, tuple) and not (isinstance(last, ast.Constant) and last.value is ...):
        same = len(value) == len(inside)
        return same and all(_fits(v, h, scope) for v, h in zip(value, inside, strict=True))
    return all(_fits(item, inside[0], scope) for item in value)


def check_all(values: Any, hints: Mapping[str, str], scope: Mapping[str, Any] = {}) -> None:
    """Raise ValueError for anything but a dict of all these entries, of these types."""
    if not isinstance(values, dict):
        raise ValueError(f"there must be {', '.join(hints)}, found {type(values).__name__}")
    missing = [name for name in hints if name not in values]
    if missing:
        found = ", ".join(map(repr, values))
        raise ValueError(f"there is no {missing[0]!r}, found {found}")
    check(values, {name: (hint, scope) for name, hint in hints.items()})


def check(values: Mapping[str, Any], hints: Mapping[str, tuple[str, Mapping[str, Any]]]) -> None:
    """Raise ValueError for a value that is not what its annotation says, or that has none."""
    for name, value in values.items():
        if name not in hints:
            raise ValueError(f"there is a {name!r}, which is none of {', '.join(hints)}")
        if not fits(value, *hints[name]):
            shown = type(value).__name__ if hasattr(value, "__len__") else repr(value)
            raise ValueError(f"{name!r} must be {hints[name][0]}, found {shown[:60]}")
