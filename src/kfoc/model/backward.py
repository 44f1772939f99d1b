"""Derivatives by what layers have put out, whose they are, and the samples made of them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kfoc.errors import problem
from kfoc.model.ownership import Directions, Rule, Scattered, Unseen, Weights, by_rows, owners
from kfoc.model.proof import MIXED
from kfoc.model.to_samples import samples_of
from kfoc.model.trace import Call, Record
from kfoc.samples.base import LayerSamples


class Tagged(NamedTuple):
    """Derivatives of one layer by weighted cotangents: per call, per pass; and the weights."""

    passes: list[list[Tensor | None]]
    weights: Weights


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
