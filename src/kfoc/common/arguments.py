"""Checks of arguments that several functions take."""

from __future__ import annotations

import operator
from collections.abc import Collection
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn


def check_model(model: object) -> None:
    """Raise where it is no module, or one whose layers cannot be watched or run with other values.

    Raises:
        ValueError: naming what was found.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(
            f"model must be a torch.nn.Module, found {_kind(model)}: wrap functions into a module "
            "that holds their parameters, and pass an instance, not a class"
        )
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            where = f" (its part {name!r})" if name else ""
            raise ValueError(
                f"the model{where} is a {type(module).__name__}, whose layers cannot be seen: pass "
                "the module that torch.jit was given"
            )


def check_predict(predict: object) -> None:
    """Raises ValueError for what is neither None nor a function."""
    if predict is not None and not callable(predict):
        raise ValueError(
            f"predict must be a function (model, inputs) -> outputs, found {predict!r}"
        )


def one_of(name: str, value: object, allowed: Collection[str]) -> None:
    """Raise ValueError for what is none of these."""
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}, found {value!r}")


def number(name: str, value: object) -> None:
    """Raise ValueError for what is no single number: Python's, NumPy's, or a tensor of one."""
    single = isinstance(value, Real) or (isinstance(value, Tensor) and value.numel() == 1)
    if not single or isinstance(value, bool):
        raise ValueError(f"{name} must be a number, found {value!r}")


def whole(name: str, value: Any, least: int) -> int:
    """A whole number of any kind (Python's, NumPy's, a tensor of one), as Python's.

    Raises:
        ValueError: anything else, booleans among it, or a number under the least.
    """
    try:
        if isinstance(value, bool):
            raise TypeError
        found = operator.index(value)
    except (TypeError, RuntimeError):
        raise ValueError(f"{name} must be a whole number, found {value!r}") from None
    if found < least:
        raise ValueError(f"{name} must be at least {least}, found {found}")
    return found


def _kind(value: object) -> str:
    return f"the class {value.__name__}" if isinstance(value, type) else f"a {type(value).__name__}"
