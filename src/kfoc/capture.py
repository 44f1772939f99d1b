"""Records what layers see in a forward pass, and the derivatives by what they put out."""

from __future__ import annotations

import math
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from kfoc.attention import Inlined, part_name
from kfoc.checks import misfit, unfit
from kfoc.embedding import TiedTreatment, tied_samples
from kfoc.layers import Treatment, Unsupported, first_argument, joined
from kfoc.record import Call, Record, accumulable, present, problem
from kfoc.samples import Direct, Grouped, Inputs, LayerSamples, Samples
from kfoc.selection import Selection

T = TypeVar("T")

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
            if name in selection.inlined:
                continue
            own = module, selection.treatments[name]
            for watched, treatment in [own, *selection.twins.get(name, [])]:
                hook = _recorder(record, name, treatment)
                handles.append(watched.register_forward_hook(hook, with_kwargs=True))
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
        if thread != record.thread and _FITTING[thread]:
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


# One layer's derivatives: per call (or edge), per direction; None where there is no path.
Directions = list[list[Tensor | None]]
Take = Callable[[str, Directions], None]


def output_gradients(
    outputs: Tensor, cotangents: Iterable[Tensor], record: Record, take: Take | None = None
) -> dict[str, Directions]:
    """Derivatives by every recorded output and every region's edges, for each cotangent.

    Args:
        take: gets a layer's name and derivatives as soon as the last backward pass is past them,
            which then needs not hold them. Not where there are regions, which come first.

    Returns:
        layer name -> the derivatives, of the layers that `take` was not called for.
    """
    places = {
        name: [call.edge for call in calls if call.edge] for name, calls in record.calls.items()
    }
    places |= {name: region.edges for name, region in record.regions.items()}
    edges = [edge for each in places.values() for edge in each]
    found: dict[str, Directions] = {name: [[] for _ in each] for name, each in places.items()}
    if not edges:
        return found
    pending = iter(cotangents)
    cotangent = next(pending, None)
    while cotangent is not None:
        following = next(pending, None)
        # The last backward pass is known as such, and frees the graph as it goes, unless regions
        # still need theirs.
        last = following is None and not record.regions
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
    name: str, record: Record, grads: list[list[Tensor | None]], num_samples: int
) -> LayerSamples:
    """One layer's samples of the batch; consumes `grads`, so that each tensor lives no longer.

    Raises:
        Unsupported: per-sample gradients that do not add up.
        ValueError: the layer's first dimension is not the batch, its input was changed in place
            after the call, or there are values that are not finite.
    """
    samples: LayerSamples
    try:
        if name in record.regions:
            samples = record.regions.pop(name).samples(grads, num_samples)
        else:
            samples = _of_calls(record.calls.pop(name), grads, num_samples)
    except ValueError as error:
        raise problem(name, str(error)) from None
    inputs, gradients = samples.magnitudes
    if not math.isfinite(inputs):
        raise problem(name, f"its input has values not finite ({inputs})")
    if not math.isfinite(gradients):
        raise problem(name, f"its output gradient has values not finite ({gradients})")
    return samples


def _of_calls(
    calls: list[Call], grads: list[list[Tensor | None]], num_samples: int
) -> LayerSamples:
    if isinstance(calls[0].treatment, TiedTreatment):
        return _tied(calls, calls[0].treatment, grads, num_samples)
    parts: dict[int | None, list[tuple[Inputs, Tensor]]] = {}
    direct: dict[int | None, list[Tensor]] = {}
    for call, directions in zip(calls, grads, strict=True):
        if call.value._version != call.version:
            raise ValueError(
                "its input was changed in place after the layer had used it: clone it first"
            )
        if call.value.shape[:1] != (num_samples,) or call.output_shape[:1] != (num_samples,):
            raise ValueError(unfit(call, num_samples))
        treatment, value = call.treatment, accumulable(call.value)
        whole = [present(grad, call) for grad in directions]
        directions.clear()
        if treatment.direct is not None:
            each = torch.stack([treatment.direct(value, grad) for grad in whole])
            direct.setdefault(call.group, []).append(each)
            continue
        inputs = treatment.inputs(value)
        shaped = [treatment.grads(grad) for grad in whole]
        whole.clear()
        wrong = misfit(inputs, shaped[0])
        if wrong:
            raise ValueError(wrong)
        stacked = shaped[0][None] if len(shaped) == 1 else torch.stack(shaped)
        parts.setdefault(call.group, []).append((inputs, stacked))
        shaped.clear()
    groups = direct.keys() | parts.keys()
    if None in groups and len(groups) > 1:
        raise ValueError("it is called as self-attention and as cross-attention")
    if direct:
        return Direct(torch.cat([sum(each[1:], each[0]) for _, each in _sorted(direct)], 2))
    if None in parts:
        return joined(parts[None], calls[0].treatment.groups)
    return Grouped(tuple(Samples.side_by_side(each) for _, each in _sorted(parts)))


def _tied(
    calls: list[Call], treatment: TiedTreatment, grads: list[list[Tensor | None]], num_samples: int
) -> LayerSamples:
    """The samples of a weight's two uses: the embedding's calls are those with integer inputs."""
    uses: list[Samples | None] = []
    for part, floating in ((treatment.head, True), (treatment.embedding, False)):
        chosen = [k for k, call in enumerate(calls) if call.value.is_floating_point() == floating]
        theirs = [replace(calls[k], treatment=part) for k in chosen]
        found = _of_calls(theirs, [grads[k] for k in chosen], num_samples) if chosen else None
        uses.append(found if isinstance(found, Samples) else None)
    return tied_samples(*uses)


def _sorted(by_group: dict[int | None, T]) -> list[tuple[int | None, T]]:
    """By the number of the group; None, of layers without, is alone."""
    return sorted(by_group.items(), key=lambda item: item[0] or 0)
