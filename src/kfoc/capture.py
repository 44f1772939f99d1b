"""Records what layers see in a forward pass, and the derivatives by what they put out."""

from __future__ import annotations

import itertools
import math
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from kfoc.assembly import samples_of
from kfoc.attention import Inlined, part_name
from kfoc.layers import Treatment, Unsupported, first_argument
from kfoc.ownership import Directions, Rule, Scattered, Unseen, Weights, by_rows, owners
from kfoc.proof import MIXED
from kfoc.record import Call, Record, problem
from kfoc.samples import LayerSamples
from kfoc.selection import Selection
from kfoc.watched import Watch, Watched


class Tagged(NamedTuple):
    """Derivatives of one layer by weighted cotangents: per call, per pass; and the weights."""

    passes: list[list[Tensor | None]]
    weights: Weights


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
        for name, module in selection.modules.items():
            handles.append(module.register_forward_pre_hook(_checker(name), with_kwargs=True))
            if name in selection.inlined or name in selection.watched:
                continue
            own = module, selection.treatments[name]
            for watched, treatment in [own, *selection.twins.get(name, [])]:
                hook = _recorder(record, name, treatment)
                handles.append(watched.register_forward_hook(hook, with_kwargs=True))
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


def _recorder(record: Record, name: str, treatment: Treatment) -> Callable[..., None]:
    def hook(module: nn.Module, args: tuple, *rest: Any) -> None:
        if _over(rest, 2):
            return
        kwargs, output = rest
        record.add(name, treatment, treatment.value(args, kwargs), output)

    return hook


def _replayer(
    record: Record, selection: Selection, name: str, whole: Inlined
) -> Callable[..., Any]:
    """A hook that puts a module's replayed output in the place of its own, if they agree.

    It takes the same steps again when a checkpointed region runs again, as that has to, possibly in
    a thread of autograd's. In a thread that fits the same model, that fit's own hook does so.
    """
    names = {part: part_name(name, part) for part in whole.parts}
    treatments = {part: selection.treatments.get(full) for part, full in names.items()}

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
        for part, full in names.items():
            if treatments[part] is not None and not agree:
                record.problems[full] = reason
        if not agree:
            return None
        for part, group, value, result in steps:
            treatment = treatments[part]
            if treatment is not None:
                record.add(names[part], treatment, value, result, group)
        return replayed

    return hook


def _by_module(selection: Selection) -> dict[nn.Module, dict[str, Watched]]:
    """The modules whose uses of weights are watched -> block name -> weight."""
    found: dict[nn.Module, dict[str, Watched]] = {}
    for name, each in selection.watched.items():
        found.setdefault(each.module, {})[name] = each
    return found


def _watching(
    record: Record, selection: Selection, module: nn.Module, watched: dict[str, Watched]
) -> list[Any]:
    """Hooks that watch a module's uses of its weights, from its forward's beginning to its end."""
    entered: list[Watch | None] = []

    def seen(
        name: str, group: int | None, rows: slice | None, value: Tensor, output: Tensor
    ) -> None:
        record.add(name, watched[name].treatment, value, output, group, rows)

    def before(*_: Any) -> None:
        wanted = watched.keys() & selection.watched.keys()
        idle = record.closed or record.paused or threading.get_ident() != record.thread
        if idle or not wanted:
            entered.append(None)
            return
        weights = {name: getattr(module, watched[name].weight) for name in wanted}
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


Take = Callable[[str, Directions], None]


def output_gradients(
    outputs: Tensor, cotangents: Iterable[Tensor], record: Record, take: Take | None = None
) -> dict[str, Directions]:
    """Derivatives by every recorded output and every loose parameter, for each cotangent.

    Args:
        take: gets a layer's name and derivatives as soon as the last backward pass is past them,
            which then needs not hold them. Not where there are loose parameters, which come first
            and may need the graph.

    Returns:
        layer name -> the derivatives, of the layers that `take` was not called for.
    """
    places: dict[str, list[Any]] = {
        name: [call.edge for call in calls if call.edge] for name, calls in record.calls.items()
    }
    places |= {name: list(loose.values()) for name, loose in record.loose.items()}
    edges = [edge for each in places.values() for edge in each]
    found: dict[str, Directions] = {name: [[] for _ in each] for name, each in places.items()}
    if not edges:
        return found
    pending = iter(cotangents)
    cotangent = next(pending, None)
    while cotangent is not None:
        following = next(pending, None)
        # The last backward pass is known as such, and frees the graph as it goes.
        last = following is None and not record.loose
        if last and take is not None:
            _last_pass(outputs, cotangent, record, found, take)
            break
        grads = torch.autograd.grad(
            outputs, edges, cotangent, retain_graph=not last, allow_unused=True
        )
        remaining = iter(grads)
        for per_call in found.values():
            for directions in per_call:
                directions.append(next(remaining))
        cotangent = following
    for call in [call for calls in record.calls.values() for call in calls]:
        call.edge = None
    return found


def tagged_gradients(
    outputs: Tensor, cotangents: Iterable[Tensor], record: Record, names: Iterable[str]
) -> dict[str, Tagged]:
    """What names the owners of the rows of some layers: see `proof`.

    Returns:
        layer name -> per call, its derivatives by the samples' weighted cotangents, pass by pass.
        With several directions they are of a sum of all, as a row may have no gradient in some,
        and its derivatives without weights come first.
    """
    calls = {name: record.calls[name] for name in names}
    edges = [call.edge for each in calls.values() for call in each if call.edge]
    directions = list(cotangents)
    kinds = [outputs.dtype, *(call.output_dtype for each in calls.values() for call in each)]
    weights = Weights.of(len(outputs), kinds)
    together: Any = sum(w * c for w, c in zip(_mixture(), directions, strict=False))
    passes = weights.cotangents(together)
    if len(directions) > 1:
        passes.insert(0, together)
    found = {name: Tagged([[] for _ in each], weights) for name, each in calls.items()}
    for cotangent in passes:
        grads = torch.autograd.grad(outputs, edges, cotangent, retain_graph=True, allow_unused=True)
        remaining = iter(grads)
        for tagged in found.values():
            for call in tagged.passes:
                call.append(next(remaining))
    return found


def with_owners(
    rules: Sequence[Rule], calls: list[Call], grads: Directions, tagged: Tagged
) -> list[Rule]:
    """The rules with the owners of this batch's rows.

    Raises:
        ValueError: rows that mix samples.
    """
    found: list[Rule] = []
    for rule, call, directions, passes in zip(rules, calls, grads, tagged.passes, strict=True):
        if not isinstance(rule, Scattered):
            found.append(rule)
            continue
        several = len(directions) > 1
        first, *rest = map(call.own, passes if several else [directions[0], *passes])
        if first is None:
            found.append(Unseen())
            continue
        present = [torch.zeros_like(first) if each is None else each for each in rest]
        by_row = [by_rows(each, call) for each in present]
        whose = owners(by_rows(first, call), by_row, tagged.weights)
        if (whose == -2).any():
            raise ValueError(MIXED)
        found.append(Scattered(whose))
    return found


def _mixture() -> Iterator[float]:
    """Weights of directions: 1, then no two the same in [0.5, 1.5)."""
    return (1.0 if not s else 0.5 + s * 0.6180339887498949 % 1 for s in itertools.count())


def _last_pass(
    outputs: Tensor, cotangent: Tensor, record: Record, found: dict[str, Directions], take: Take
) -> None:
    """Complete the derivatives, and hand each layer's over before the pass goes on below it.

    Nothing lies below the edges that are not passed: theirs are collected by autograd to the end.
    """
    waiting = {name: len(calls) for name, calls in record.calls.items()}

    def watch(name: str, place: int, result: int) -> Callable[..., None]:
        def hook(grads: tuple[Tensor | None, ...]) -> None:
            found[name][place].append(grads[result])
            waiting[name] -= 1
            if not waiting[name]:
                take(name, found.pop(name))

        return hook

    # No variable here may hold on to a call, whose input is to go with its layer.
    places = [
        (name, place, call.edge, call.passed)
        for name, calls in record.calls.items()
        for place, call in enumerate(calls)
        if call.edge
    ]
    edges = [edge for _, _, edge, passed in places if not passed]
    ends = [found[name][place] for name, place, _, passed in places if not passed]
    handles = [
        edge.node.register_prehook(watch(name, place, edge.output_nr))
        for name, place, edge, passed in places
        if passed
    ]
    del places
    count = len(found[next(iter(found))][0]) + 1
    try:
        grads = torch.autograd.grad(outputs, edges, cotangent, allow_unused=True)
    finally:
        for handle in handles:
            handle.remove()
    for directions, grad in zip(ends, grads, strict=True):
        directions.append(grad)
    for per_call in found.values():
        for directions in per_call:
            if len(directions) < count:  # the pass did not come by
                directions.append(None)


def take_samples(
    name: str,
    calls: list[Call],
    grads: Directions,
    num_samples: int,
    rules: Sequence[Rule],
    tagged: Tagged | None = None,
) -> LayerSamples:
    """One layer's samples of the batch; consumes `grads`, so that each tensor lives no longer.

    Raises:
        ValueError: a call that does not fit the layer's treatment, rows that mix samples, an input
            that was changed in place after the call, or values that are not finite.
    """
    try:
        if tagged is not None:
            rules = with_owners(rules, calls, grads, tagged)
        samples = samples_of(calls, grads, num_samples, rules)
    except ValueError as error:
        raise problem(name, str(error)) from None
    return checked_finite(name, samples)


def checked_finite(name: str, samples: LayerSamples) -> LayerSamples:
    """The same samples. Raises ValueError where they have values that are not finite."""
    inputs, gradients = samples.magnitudes
    if not math.isfinite(inputs):
        raise problem(name, f"its input has values not finite ({inputs})")
    if not math.isfinite(gradients):
        raise problem(name, f"its output gradient has values not finite ({gradients})")
    return samples
