"""What a caller sets for the models in reach: autocast, the precision of products, and more.

Autocast, TF32, default devices and inference mode are meant for the model's own forward pass. The
library's algebra is done without them, in the dtypes and on the devices of its tensors.
"""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar, cast

import torch

from kfoc.common.threads import FULL_PRODUCTS

# torch.autocast's; asking for one that a build of torch lacks does no harm.
_TYPES = ("cpu", "cuda", "xpu", "mps")
_OPERATORS = ("__add__", "__radd__", "__mul__", "__rmul__")
_CPU = torch.device("cpu")
_END = object()

Function = TypeVar("Function", bound=Callable[..., Any])
T = TypeVar("T")


class _Lifted(threading.local):
    """What has been lifted in this thread: the types of autocast, and the default device."""

    found: tuple[tuple[str, ...], torch.device] | None = None


_LIFTED = _Lifted()


@contextmanager
def plain() -> Iterator[None]:
    """The caller's autocast, precision of products, default device and inference mode are out of
    force.

    Results are tensors that autograd can use later on. No gradients are recorded, in place of
    inference mode.
    """
    if _LIFTED.found is not None:
        yield
        return
    types = tuple(kind for kind in _TYPES if torch.is_autocast_enabled(kind))
    device = torch.get_default_device()
    with ExitStack() as stack:
        if torch.is_inference_mode_enabled():
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.no_grad())
        stack.enter_context(FULL_PRODUCTS)
        stack.enter_context(_set((types, device), on=False))
        yield


@contextmanager
def callers() -> Iterator[None]:
    """Inside `plain`: all but inference mode as the caller has it, for what is the caller's.

    Autocast keeps the weights it has cast. Those of other forward passes are forgotten, before and
    after: they may be without a graph, or of other values.
    """
    found = _LIFTED.found
    if found is None:
        yield
        return
    torch.clear_autocast_cache()
    FULL_PRODUCTS.__exit__()
    try:
        with _set(found, on=True):
            yield
    finally:
        FULL_PRODUCTS.__enter__()
        torch.clear_autocast_cache()


@contextmanager
def _set(found: tuple[tuple[str, ...], torch.device], on: bool) -> Iterator[None]:
    types, device = found
    before, _LIFTED.found = _LIFTED.found, None if on else found
    with ExitStack() as stack:
        if device != _CPU:  # a mode that every call of torch goes through: only where it matters
            stack.enter_context(device if on else _CPU)
        try:
            for kind in types:
                torch.set_autocast_enabled(kind, on)
            yield
        finally:
            for kind in types:
                torch.set_autocast_enabled(kind, not on)
            _LIFTED.found = before


def as_called(data: Iterable[T]) -> Iterator[T]:
    """The items of data, each made as the caller would: a loader may run a model too."""
    items = iter(data)
    while True:
        with callers():
            item = next(items, _END)
        if item is _END:
            return
        yield cast(T, item)


def plainly(function: Function) -> Function:
    """A function that runs in `plain`; a generator, which runs in pieces, stays as it is."""
    if inspect.isgeneratorfunction(function):
        return function

    @functools.wraps(function)
    def inside(*args: Any, **kwargs: Any) -> Any:
        with plain():
            return function(*args, **kwargs)

    return cast(Function, inside)


class Plain:
    """Classes whose public methods and operators run in `plain`."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for name, method in list(vars(cls).items()):
            public = not name.startswith("_") or name in _OPERATORS
            function = getattr(method, "__func__", method)  # of a class method
            if public and inspect.isfunction(function):
                inside = plainly(function)
                setattr(cls, name, inside if function is method else type(method)(inside))
