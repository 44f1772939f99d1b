"""What a layer's calls saw, brought to samples and their positions.

Where the samples lie in order along one dimension, perhaps with several rows each, a call is
reshaped; otherwise its rows are gathered by their owners. A sample's positions are its rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor

from kfoc.layers.rule import Treatment
from kfoc.layers.tied import TiedTreatment, tied_samples
from kfoc.linalg.scaling import wide
from kfoc.model.ownership import Directions, InOrder, Rule, Scattered, Unseen, row_count
from kfoc.model.trace import Call, present
from kfoc.samples.base import LayerSamples
from kfoc.samples.direct import Direct
from kfoc.samples.grouped import Grouped, joined
from kfoc.samples.inputs import Folded, Inputs, Rows
from kfoc.samples.linear import Samples
from kfoc.samples.one_hot import OneHot
from kfoc.samples.patches import Patches

T = TypeVar("T")

CHANGED = "its input was changed in place after the layer had used it: clone it first"


def samples_of(
    calls: list[Call], grads: Directions, num_samples: int, rules: Sequence[Rule]
) -> LayerSamples:
    """One layer's samples of a batch; consumes `grads`, so that no tensor outlives its use.

    Args:
        calls: of the layer, in one forward pass.
        grads: the derivatives by what they put out.
        rules: how each call's rows belong to samples, with the owners of what is scattered.

    Raises:
        ValueError: a call that does not fit its treatment.
    """
    if isinstance(calls[0].treatment, TiedTreatment):
        return _tied(calls, calls[0].treatment, grads, num_samples, rules)
    parts: dict[int | None, list[tuple[Inputs, Tensor]]] = {}
    direct: dict[int | None, list[Tensor]] = {}
    loose: dict[int | None, list[tuple[Inputs, Tensor, Tensor]]] = {}
    for call, directions, rule in zip(calls, grads, rules, strict=True):
        if call.value._version != call.version:
            raise ValueError(CHANGED)
        whole = [present(grad, call) for grad in directions]
        directions.clear()
        if isinstance(rule, Unseen):
            rule = _silent_rule(call, num_samples)
        value, whole = _rows_first(call, whole, rule)
        if call.treatment.direct is not None:
            direct.setdefault(call.group, []).append(
                _direct(call.treatment, value, whole, num_samples, rule)
            )
            continue
        inputs, stacked = _linear(call.treatment, value, whole)
        if isinstance(rule, InOrder):
            positions = stacked.shape[2] * rule.each
            stacked = stacked.reshape(len(stacked), num_samples, positions, stacked.shape[3])
            parts.setdefault(call.group, []).append((_folded(inputs, rule.each), stacked))
        else:
            owners = _owners(rule)
            loose.setdefault(call.group, []).append((inputs, stacked, owners))
    counts: dict[int | None, float] = {}
    for group, each in loose.items():
        ordered = sum(stacked.shape[2] for _, stacked in parts.get(group, ()))
        rows, stacked, count = _gathered(each, num_samples)
        parts.setdefault(group, []).append((rows, stacked))
        counts[group] = count + ordered
    groups = direct.keys() | parts.keys()
    if None in groups and len(groups) > 1:
        raise ValueError("it is called as self-attention and as cross-attention")
    if direct:
        return Direct(torch.cat([sum(each[1:], each[0]) for _, each in _sorted(direct)], 2))
    if None in parts:
        whole_layer = joined(parts[None], calls[0].treatment.groups)
        return _counted(whole_layer, counts.get(None))
    found = {
        group or 0: replace(Samples.side_by_side(each), rows_per_sample=counts.get(group))
        for group, each in _sorted(parts)
    }
    if calls[0].treatment.layout == "matrices":  # of which some may not have been used
        silent = next(iter(found.values())).silent(num_samples)
        found = {group: found.get(group, silent) for group in range(calls[0].treatment.groups)}
    return Grouped(tuple(found.values()))


def _silent_rule(call: Call, num_samples: int) -> InOrder | Scattered:
    """Any rule does for rows without a gradient; that by shapes keeps the inputs, for K-FAC."""
    rule = InOrder()
    if rule.fits(call.value.shape, num_samples) and rule.fits(call.output_shape, num_samples):
        return rule
    owners = torch.full((row_count(call),), -1, device=call.value.device)
    return Scattered(owners)


def _counted(samples: LayerSamples, rows: float | None) -> LayerSamples:
    """Says how many rows a sample has on average, where some positions are mere padding."""
    if rows is None:
        return samples
    if isinstance(samples, Grouped):
        return Grouped(tuple(replace(group, rows_per_sample=rows) for group in samples.groups))
    return replace(samples, rows_per_sample=rows) if isinstance(samples, Samples) else samples


def _rows_first(
    call: Call, grads: list[Tensor], rule: InOrder | Scattered
) -> tuple[Tensor, list[Tensor]]:
    """Input and derivatives with the dimension of the samples in front, or all rows in one."""
    value = wide(call.value)
    if isinstance(rule, InOrder):
        if rule.axis == 0:
            return value, grads
        return value.movedim(rule.axis, 0), [grad.movedim(rule.axis, 0) for grad in grads]
    last = call.leading - 1
    if last == 0:
        return value, grads
    return value.flatten(0, last), [grad.flatten(0, last) for grad in grads]


def _linear(treatment: Treatment, value: Tensor, grads: list[Tensor]) -> tuple[Inputs, Tensor]:
    """Inputs (M, T, i), and gradients (S, M, T, o) of the same dtype."""
    inputs = treatment.inputs(value)
    shaped = [treatment.grads(grad) for grad in grads]
    grads.clear()
    if inputs.num_positions != shaped[0].shape[1]:
        raise ValueError(
            f"its output has {shaped[0].shape[1]} positions where its input makes for "
            f"{inputs.num_positions}"
        )
    return inputs, shaped[0][None] if len(shaped) == 1 else torch.stack(shaped)


def _direct(
    treatment: Treatment,
    value: Tensor,
    grads: list[Tensor],
    num_samples: int,
    rule: InOrder | Scattered,
) -> Tensor:
    """Per-sample gradients (S, N, o, i), those of a sample's rows added up."""
    assert treatment.direct is not None
    each = torch.stack([treatment.direct(value, grad) for grad in grads])
    if isinstance(rule, InOrder):
        if rule.each == 1:
            return each
        return each.unflatten(1, (num_samples, rule.each)).sum(2)
    owners = _owners(rule)
    found = each.new_zeros(len(each), num_samples, *each.shape[2:])
    return found.index_add_(1, owners[owners >= 0], each[:, owners >= 0])


def _folded(inputs: Inputs, each: int) -> Inputs:
    if each == 1:
        return inputs
    if isinstance(inputs, Patches):  # its positions are those of an image, and not in its tensor
        return Folded(inputs, each)
    tensor = inputs.tensor
    count, positions = tensor.shape[0] // each, tensor.shape[1] * each
    return inputs.with_tensor(tensor.reshape(count, positions, *tensor.shape[2:]))


def _owners(rule: Scattered) -> Tensor:
    if rule.owners is None:
        raise ValueError("the owners of its rows were not found")
    return rule.owners


def _gathered(
    calls: list[tuple[Inputs, Tensor, Tensor]], num_samples: int
) -> tuple[Inputs, Tensor, float]:
    """All rows of several calls by owner: inputs, gradients, and how many rows a sample has.

    Samples with fewer rows than others have zeros behind theirs, in inputs and gradients, which add
    nothing to a per-sample gradient.
    """
    owners = torch.cat([owners for _, _, owners in calls])
    kept = (owners >= 0).nonzero()[:, 0]
    kept = kept[owners[kept].argsort(stable=True)]  # by owner, in order
    owners = owners[kept]
    counts = torch.bincount(owners, minlength=num_samples)
    most = int(counts.max()) if len(owners) else 0
    starts = counts.cumsum(0) - counts
    slots = owners * most + torch.arange(len(owners), device=owners.device) - starts[owners]
    grads = torch.cat([grads for _, grads, _ in calls], 1)[:, kept]
    per_row = grads.shape[2]
    first = calls[0][0]
    if isinstance(first, OneHot):
        tokens = torch.cat([inputs.tensor for inputs, _, _ in calls])[kept]
        placed = tokens.new_full((num_samples * most, *tokens.shape[1:]), -1)
        placed.index_copy_(0, slots, tokens)
        gathered: Inputs = first.with_tensor(placed.reshape(num_samples, most * per_row))
    else:
        rows = torch.cat([inputs.rows(0, inputs.num_samples) for inputs, _, _ in calls])[kept]
        gathered = Rows(_placed(rows[None], slots, num_samples, most)[0])
    placed_grads = _placed(grads, slots, num_samples, most)
    return gathered, placed_grads, per_row * len(owners) / max(1, num_samples)


def _placed(rows: Tensor, slots: Tensor, count: int, most: int) -> Tensor:
    """(S, rows, T, n) to (S, N, most * T, n), zeros where there is no row."""
    placed = rows.new_zeros(len(rows), count * most, *rows.shape[2:])
    placed.index_copy_(1, slots, rows)
    return placed.reshape(len(rows), count, most * rows.shape[2], rows.shape[3])


def _tied(
    calls: list[Call],
    treatment: TiedTreatment,
    grads: Directions,
    num_samples: int,
    rules: Sequence[Rule],
) -> LayerSamples:
    """The samples of a weight's two uses: the embedding's calls are those with integer inputs."""
    uses: list[Samples | None] = []
    for part, floating in ((treatment.head, True), (treatment.embedding, False)):
        chosen = [k for k, call in enumerate(calls) if call.value.is_floating_point() == floating]
        theirs = [replace(calls[k], treatment=part) for k in chosen]
        each = [grads[k] for k in chosen], num_samples, [rules[k] for k in chosen]
        found = samples_of(theirs, *each) if chosen else None
        uses.append(found if isinstance(found, Samples) else None)
    return tied_samples(*uses)


def _sorted(by_group: dict[int | None, T]) -> list[tuple[int | None, T]]:
    """By the number of the group; None, of layers without, is alone."""
    return sorted(by_group.items(), key=lambda item: item[0] or 0)
