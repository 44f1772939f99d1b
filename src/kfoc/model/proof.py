"""How a fit knows that its samples are right: two weighted backward passes over a few of them.

Write g_m for the output gradient of row m of a layer's call, in a backward pass from the cotangents
c_n of the samples' outputs, and h_m for the same from the cotangents v_n c_n. By linearity
`g_m = sum_n d(c_n . f_n) / d s_m`, so h_m = v_n g_m where row m belongs to sample n alone, and
(almost surely) nowhere else: the ratio *names the sample*, and what is left says that the row
mixes samples. And `sum_m g_m a_m^T`, over all recorded calls, has to be autograd's gradient of the
weight: it is not where a use was not recorded, where the recorded output is not what the parameters
gave, or where the recorded input is not what went in.

The weights v_n are powers of two. Scaling by those rounds nothing, so in a sound layer h_m is
v_n g_m to the last bit, in any precision and however much cancels on the way to it; many samples
are told apart by few passes, whose exponents are the digits of a sample's number. The sums are
compared relative to sizes *before* cancellation, which the same sums with random weights for every
entry of g show: the gradient of a bias under a softmax is exactly zero, and right.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from kfoc.errors import problem
from kfoc.layers.selection import Selection
from kfoc.model.ownership import (
    Directions,
    InOrder,
    Rule,
    Scattered,
    Unseen,
    Weights,
    by_rows,
    in_order,
    owners,
    rows_shape,
)
from kfoc.model.sums import Evidence, adds_up
from kfoc.model.to_samples import CHANGED
from kfoc.model.trace import Call, Record

# Samples of a batch that the check runs on, at least and at most: an eighth of it in between, as
# each costs what it costs in the batch.
FEW = 3, 6

MIXED = "its rows mix samples, or belong to none (batch_first? a layer over the batch?)"
UNSUMMED = (
    "its calls do not add up to the gradient of its parameters (are they used outside of it as "
    "well, or does a hook or a replaced forward change what it puts out?)"
)
UNORDERED = "its rows are the samples' in no order, which sharded models cannot be asked for"
UNSURE = "no gradient reached some of its rows when they were checked, and one does now"
# What a layer's calls must have in common with those that were checked.
Signature = tuple[object, ...]


@dataclass
class Proof:
    """What is known of every layer's calls.

    Attributes:
        rules: layer name -> calls of this signature -> how their rows belong to samples.
        unsummed: layers whose sums could not be compared, as their parameters are sharded.
    """

    rules: dict[str, dict[Signature, tuple[Rule, ...]]] = field(default_factory=dict)
    unsummed: set[str] = field(default_factory=set)

    def known(self, name: str, record: Record, count: int) -> tuple[Rule, ...] | None:
        """The rules of a layer's calls in this batch; None where they are not checked yet."""
        calls = record.calls[name]
        known = self.rules.get(name, {})
        if _pattern(name, record, count) in known:  # in any number
            return (Scattered(),) * len(calls)
        rules = known.get(_signature(name, record, count))
        if rules is None or not all(map(_fits, rules, calls, [count] * len(calls))):
            return None
        return rules

    def take(self, findings: Findings, record: Record, count: int) -> None:
        """Remember what a check of this record found; the owners of its rows are its own."""
        self.unsummed |= findings.unsummed
        for name, rules in findings.rules.items():
            known = self.rules.setdefault(name, {})
            if any(map(is_scattered, rules)):
                # What tokens are routed to is not to be trusted to have an order.
                known[_pattern(name, record, count)] = ()
            else:
                known[_signature(name, record, count)] = rules


def is_scattered(rule: Rule) -> bool:
    """Whether owners have to be found in every batch."""
    return isinstance(rule, Scattered)


def seen_anew(rules: Sequence[Rule], calls: Sequence[Call], grads: Directions) -> bool:
    """Whether a gradient reaches rows that none had reached when they were checked."""
    for rule, call, each in zip(rules, calls, grads, strict=True):
        present = map(call.own, each) if isinstance(rule, Unseen) else ()
        if any(grad is not None and grad.any() for grad in present):
            return True
    return False


def _signature(name: str, record: Record, count: int) -> Signature:
    """A batch of one sample proves nothing of others, nor does one use of a parameter of two."""
    shapes = [(call.group, call.value.ndim, len(call.output_shape)) for call in record.calls[name]]
    return count == 1, record.uses.get(name), *shapes


def _pattern(name: str, record: Record, count: int) -> Signature:
    """As the signature, for any number of calls: what else took the parameters, and their kinds.

    How many experts have tokens differs from batch to batch.
    """
    calls = record.calls[name]
    places = {(call.edge.node, call.edge.output_nr) for call in calls if call.edge}
    other = tuple(uses - len(places) for uses in record.uses.get(name, ()))
    kinds = frozenset((call.value.ndim, len(call.output_shape)) for call in calls)
    return count == 1, "scattered", other, kinds


def _fits(rule: Rule, call: Call, count: int) -> bool:
    return not isinstance(rule, InOrder) or (
        rule.fits(rows_shape(call), count) and rule.fits(call.value.shape, count)
    )


def fitting(calls: Iterable[Call], count: int) -> bool:
    """Whether first dimensions can be the samples, by shapes alone."""
    return all(_fits(InOrder(), call, count) for call in calls)


def unfitting(calls: Iterable[Call], count: int) -> str:
    """What is wrong where they cannot."""
    call = next(call for call in calls if not _fits(InOrder(), call, count))
    shape = call.output_shape if call.value.shape[:1] == (count,) else call.value.shape
    return (
        f"its first dimension is {shape[0] if shape else 'missing'} in a batch of {count} samples: "
        "it must run over the samples"
    )


@dataclass
class Findings:
    """What a check found.

    Attributes:
        count: of the samples that it was made on.
        rules: layer name -> the rules of its calls.
        reasons: layer name -> why it has no treatment.
        unsummed: layers whose sums could not be compared.
    """

    count: int
    rules: dict[str, tuple[Rule, ...]] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)
    unsummed: set[str] = field(default_factory=set)

    def refuse_scattered(self) -> None:
        """Leave out layers whose rows' owners would have to be found in every batch."""
        for name in [name for name, rules in self.rules.items() if any(map(is_scattered, rules))]:
            del self.rules[name]
            self.reasons[name] = UNORDERED


def check(outputs: Tensor, record: Record, selection: Selection, names: Iterable[str]) -> Findings:
    """Check layers on a forward pass of their own, whose graph it leaves as it is.

    Args:
        outputs: of that pass, samples first.
        record: of that pass.
        names: the layers to check, of those that it called.

    Raises:
        ValueError: an input that was changed in place after a layer had used it.
    """
    calls = {name: record.calls[name] for name in names if name in record.calls}
    for name, each in calls.items():  # with which autograd has no gradients of the weight
        if any(call.value._version != call.version for call in each):
            raise problem(name, CHANGED)
    held = {name: list(selection.layer(name).parameters.values()) for name in calls}
    # Those of `fully_shard` are no leaves of the graph: what is used comes from all ranks.
    sharded = {n for n, each in held.items() if any(hasattr(p, "device_mesh") for p in each)}
    kinds = [outputs.dtype, *(call.output_dtype for each in calls.values() for call in each)]
    weights = Weights.of(len(outputs), kinds)
    generator = torch.Generator().manual_seed(0)
    found = Findings(len(outputs), unsummed=sharded)
    for name, evidence in _evidence(outputs, calls, held, sharded, weights, generator).items():
        try:
            rules = _rules(evidence, weights)
            if rules is None:
                found.reasons[name] = MIXED
            elif adds_up(evidence, rules, selection, name, len(outputs), generator):
                found.rules[name] = tuple(rules)
            else:
                found.reasons[name] = UNSUMMED
        except ValueError as error:  # of a treatment, at what it was not made for
            found.reasons[name] = str(error)
    return found


def _evidence(
    outputs: Tensor,
    calls: dict[str, list[Call]],
    held: dict[str, list[Any]],
    sharded: set[str],
    weights: Weights,
    generator: torch.Generator,
) -> dict[str, Evidence]:
    """A backward pass to calls and parameters, and those by weighted cotangents to calls alone."""
    edges = [call.edge for each in calls.values() for call in each if call.edge]
    if not edges:
        return {}
    leaves: list[Any] = [p for name in calls if name not in sharded for p in held[name]]
    cotangent = torch.randn(outputs.shape, generator=generator, dtype=torch.float32).to(outputs)
    options: dict[str, Any] = {"retain_graph": True, "allow_unused": True}
    first = torch.autograd.grad(outputs, [*edges, *leaves], cotangent, **options)
    grads, sums = iter(first[: len(edges)]), iter(first[len(edges) :])
    passes = [
        iter(torch.autograd.grad(outputs, edges, each, **options))
        for each in weights.cotangents(cotangent)
    ]
    return {
        name: Evidence(
            each,
            [call.own(next(grads)) for call in each],
            [[call.own(next(single)) for single in passes] for call in each],
            None if name in sharded else [next(sums) for _ in held[name]],
        )
        for name, each in calls.items()
    }


def _rules(evidence: Evidence, weights: Weights) -> list[Rule] | None:
    """How the rows of a layer's calls belong to samples; None where they are mixed."""
    rules = []
    for call, grad, tagged in zip(evidence.calls, evidence.grads, evidence.tagged, strict=True):
        rule = _rule(call, grad, tagged, weights)
        if rule is None:
            return None
        rules.append(rule)
    if any(map(is_scattered, rules)):
        each = zip(rules, evidence.calls, strict=True)
        return [_spread(rule, call, weights.count) for rule, call in each]
    return rules


def _rule(
    call: Call, grad: Tensor | None, tagged: list[Tensor | None], weights: Weights
) -> Rule | None:
    """How the rows of a call belong to samples, with their owners; None where they are mixed.

    Raises:
        ValueError: input and output have not the same rows.
    """
    if call.value.shape[:1] != call.output_shape[:1]:
        raise ValueError(
            f"its input has {[*call.value.shape]} and its output {[*call.output_shape]} entries: "
            "the first dimension must be the same"
        )
    if grad is None or not grad.any():
        return Unseen()
    present = [torch.zeros_like(grad) if each is None else each for each in tagged]
    each = in_order(grad, present, weights)  # as a rule, to the last bit
    if each:
        return InOrder(0, each)
    shape, count = rows_shape(call), weights.count
    whose = owners(by_rows(grad, call), [by_rows(each, call) for each in present], weights)
    if (whose == -2).any():
        return None
    alive = whose >= 0
    if not alive.any():
        return Unseen()
    for axis, size in enumerate(shape):
        if size % count or not size:
            continue
        expected = _in_order(shape, axis, count, whose.device)
        if bool((expected == whose)[alive].all()):
            return InOrder(axis, size // count)
    return Scattered(whose)


def _spread(rule: Rule, call: Call, count: int) -> Rule:
    """Rows in order as rows of no order, with their owners."""
    if not isinstance(rule, InOrder):
        return rule
    return Scattered(_in_order(rows_shape(call), rule.axis, count, call.value.device))


def _in_order(shape: Sequence[int], axis: int, count: int, device: torch.device) -> Tensor:
    """The owner of every row where samples lie in order along an axis: (M,)."""
    number = torch.arange(shape[axis], device=device) // (shape[axis] // count)
    return number.view(-1, *[1] * (len(shape) - axis - 1)).expand(*shape).reshape(-1)
