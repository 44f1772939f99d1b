"""Records what layers see in a forward pass."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from kfoc.errors import problem
from kfoc.layers.attention import Inlined, part_name
from kfoc.layers.layer import Layer
from kfoc.layers.rule import Treatment, Unsupported, first_argument
from kfoc.layers.selection import Selection
from kfoc.layers.watched import Watch
from kfoc.model.trace import Record

# How many fits each thread is in the midst of.
_FITTING: Counter[int] = Counter()


@contextmanager
def captured(selection: Selection) -> Iterator[Record]:
    """Watch the selected layers while the context lasts.

    Every hook is gone when it ends, however it ends.
    """
    record = Record()
    handles = []
    _FITTING[record.thread] += 1
    try:
        for name, layer in selection.layers.items():
            check = _checker(name)
            handles.append(layer.module.register_forward_pre_hook(check, with_kwargs=True))
            if layer.home in selection.inlined or layer.weight is not None:
                continue
            for module, treatment in [(layer.module, layer.treatment), *layer.twins]:
                hook = _recorder(record, name, treatment)
                handles.append(module.register_forward_hook(hook, with_kwargs=True))
        for module, weights in _by_module(selection).items():
            handles += _watching(record, selection, module, weights)
        for name, whole in selection.inlined.items():
            hook = _replayer(record, selection, name, whole)
            handles.append(whole.module.register_forward_hook(hook, with_kwargs=True))
        yield record
    finally:
        for handle in handles:
            handle.remove()
        record.clear()
        _FITTING[record.thread] -= 1


def _over(arguments: tuple, expected: int) -> bool:
    """Whether the fit that a hook belongs to ended while another thread was about to call it.

    torch then no longer knows that the hook takes keyword arguments, and passes none.
    """
    return len(arguments) < expected


def _checker(name: str) -> Callable[..., None]:
    def hook(module: nn.Module, args: tuple, *rest: Any) -> None:
        if _over(rest, 1):
            return
        (kwargs,) = rest
        value = first_argument(args, kwargs)
        integer = isinstance(value, Tensor) and not value.is_floating_point()
        if integer and not isinstance(module, nn.Embedding):
            raise problem(
                name,
                f"its input is {value.dtype}, not floating point: convert it, e.g. by .float()",
            )

    return hook


def _recorder(record: Record, name: str, treatment: Treatment) -> Callable[..., Any]:
    def hook(module: nn.Module, args: tuple, *rest: Any) -> Any:
        if _over(rest, 2):
            return None
        kwargs, output = rest
        value, spread = treatment.value(args, kwargs), None
        if name in record.spread and len(value) == 1 < record.count and not record.paused:
            # Also when a checkpointed region runs again, which has to take the same steps.
            value = value.expand(record.count, *value.shape[1:])
            output = spread = output.expand(record.count, *output.shape[1:])
        record.add(name, treatment, value, output)
        return spread

    return hook


def _replayer(
    record: Record, selection: Selection, name: str, whole: Inlined
) -> Callable[..., Any]:
    """A hook that puts a module's replayed output in the place of its own, if they agree.

    It takes the same steps again when a checkpointed region runs again, as that has to, possibly in
    a thread of autograd's. In a thread that fits the same model, that fit's own hook does so.
    """
    layers = {part: selection.of_module(part_name(name, part)) for part in whole.parts}

    def hook(module: nn.Module, args: tuple, *rest: Any) -> Any:
        if _over(rest, 2):
            return None
        kwargs, output = rest
        thread = threading.get_ident()
        if record.paused or (thread != record.thread and _FITTING[thread]):
            return None
        steps: list[tuple[str, int | None, Tensor, Tensor]] = []
        try:
            replayed = whole.replay(args, kwargs, lambda *step: steps.append(step))
            agree = _agree(replayed, output)
            reason = "its output is not what its parameters give (is there another hook?)"
        except Unsupported as unsupported:
            agree, reason = False, str(unsupported)
        if not agree:
            record.problems |= {each.name: reason for found in layers.values() for each in found}
            return None
        for part, group, value, result in steps:
            for layer in layers[part]:
                record.add(layer.name, layer.treatment, value, result, group)
        return replayed

    return hook


def _by_module(selection: Selection) -> dict[nn.Module, dict[str, Layer]]:
    """The modules whose uses of weights are watched -> block name -> layer."""
    found: dict[nn.Module, dict[str, Layer]] = {}
    for layer in [*selection.layers.values(), *selection.watched.values()]:
        if layer.weight is not None:
            found.setdefault(layer.module, {})[layer.name] = layer
    return found


def _watching(
    record: Record, selection: Selection, module: nn.Module, watched: dict[str, Layer]
) -> list[Any]:
    """Hooks that watch a module's uses of its weights, from its forward's beginning to its end."""
    entered: list[Watch | None] = []

    def seen(
        name: str, group: int | None, rows: slice | None, value: Tensor, output: Tensor
    ) -> None:
        record.add(name, watched[name].treatment, value, output, group, rows)

    def before(*_: Any) -> None:
        wanted = watched.keys() & (selection.watched.keys() | selection.layers.keys())
        idle = record.closed or record.paused or threading.get_ident() != record.thread
        if idle or not wanted:
            entered.append(None)
            return
        weights = {name: getattr(module, watched[name].weight or "") for name in wanted}
        watch = Watch(weights, seen)
        watch.__enter__()
        entered.append(watch)

    def after(*_: Any) -> None:
        watch = entered.pop() if entered else None
        if watch is not None:
            watch.__exit__(None, None, None)

    return [
        module.register_forward_pre_hook(before),
        module.register_forward_hook(after, always_call=True),
    ]


@torch.no_grad()
def _agree(replayed: Any, output: Any) -> bool:
    """Whether two tensors, or tuples of tensors and None, are the same to rounding."""
    if isinstance(output, Tensor):
        tolerance = 100 * torch.finfo(output.dtype).eps
        size = output.nan_to_num().abs().max().item() if output.numel() else 0.0
        return torch.allclose(replayed, output, rtol=0, atol=tolerance * size, equal_nan=True)
    if isinstance(output, tuple):
        return all(_agree(a, b) for a, b in zip(replayed, output, strict=True))
    return replayed is None and output is None
