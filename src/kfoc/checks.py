"""What a forward pass shows of layers that have no treatment after all."""

from __future__ import annotations

from collections.abc import Container

import torch
from torch import Tensor

from kfoc.graph import Graph, used_elsewhere
from kfoc.record import Call, Record, accumulable
from kfoc.samples import Inputs
from kfoc.selection import Selection


def untreatable(
    outputs: Tensor,
    graph: Graph,
    record: Record,
    selection: Selection,
    known: Container[str],
) -> dict[str, str]:
    """Layers that this forward pass shows to have no treatment.

    Args:
        known: layers of which all but the use of their parameters was looked at in earlier batches.

    Returns:
        layer name -> the reason not to treat it.

    Raises:
        ValueError: a graph of which no layer's derivatives can be had.
    """
    for name in graph.names():
        if name in NO_DERIVATIVES:
            raise ValueError(NO_DERIVATIVES[name])
    new = {name: calls for name, calls in record.calls.items() if name not in known}
    # A layer all of whose gradients are zero has no block, unless earlier batches gave it one.
    silent = record.mute - record.calls.keys()
    reasons = {
        name: "its output carries no gradient (torch.no_grad()?)"
        for name in silent
        if name not in known
    }
    count = outputs.shape[0]
    for name, calls in new.items():
        found = next(filter(None, (unfit(call, count) for call in calls)), None)
        if found:
            reasons[name] = found
    reasons |= not_by_sample(outputs, new) | record.problems
    called = {name: len(calls) for name, calls in record.calls.items()}
    return used_elsewhere(graph, called, selection.parameters()) | reasons


# Operations in the graph that torch.autograd.grad does not get past.
NO_DERIVATIVES = {
    "CheckpointFunctionBackward": (
        "the model uses torch.utils.checkpoint with use_reentrant=True, which gives no derivatives "
        "by layers: pass use_reentrant=False"
    ),
    "CompiledFunctionBackward": (
        "the model runs compiled, and its layers cannot be seen: pass the module that "
        "torch.compile was given"
    ),
}


def unfit(call: Call, num_samples: int) -> str | None:
    """Why a call does not fit its treatment, judged by shapes and a first sample."""
    if call.value.shape[:1] != (num_samples,) or call.output_shape[:1] != (num_samples,):
        wrong = call.value.shape if call.value.shape[:1] != (num_samples,) else call.output_shape
        found = wrong[0] if wrong else "missing"
        return (
            f"its first dimension is {found} in a batch of {num_samples} samples: it must run over "
            "the samples"
        )
    treatment, shape = call.treatment, call.value.shape
    if treatment.maps_rows and len(shape) > 1 and shape[:-1] == call.output_shape[:-1]:
        return None  # without a sample: that it fits shows by shapes alone
    value = accumulable(call.value[:1])
    grad = value.new_zeros(1, *call.output_shape[1:])
    try:
        if treatment.direct is not None:
            treatment.direct(value, grad)
            return None
        return misfit(treatment.inputs(value), treatment.grads(grad))
    except ValueError as error:
        return str(error)


def not_by_sample(outputs: Tensor, called: dict[str, list[Call]]) -> dict[str, str]:
    """Layers whose first dimension has the size of the batch, but is not the samples.

    Only shapes that leave it open are tried, such as (N, N, features), or (N,) tokens, which may be
    the positions of a sequence: one backward pass from the first sample's outputs alone must leave
    the other rows of a layer's derivative at zero.

    Returns:
        layer name -> the reason not to treat it.
    """
    count = len(outputs)
    doubtful = {
        name: [call for call in calls if call.edge]
        for name, calls in called.items()
        if count > 1 and any(call.value.shape[:2] in ((count, count), (count,)) for call in calls)
    }
    if not doubtful:
        return {}
    cotangent = torch.zeros_like(outputs)
    # Different weights for different outputs: equal ones cancel in a softmax.
    cotangent[0] = torch.linspace(0.5, 1.5, outputs[0].numel()).to(outputs).view(outputs[0].shape)
    edges = [call.edge for calls in doubtful.values() for call in calls if call.edge]
    grads = iter(
        torch.autograd.grad(outputs, edges, cotangent, retain_graph=True, allow_unused=True)
    )
    reasons = {}
    for name, calls in doubtful.items():
        for grad in [next(grads) for _ in calls]:
            if grad is not None and len(grad) == count and grad[1:].any():
                reasons[name] = "its first dimension does not run over the samples (batch_first?)"
    return reasons


def misfit(inputs: Inputs, grads: Tensor) -> str | None:
    """What is wrong where a call's output, (N, T, o), has other positions than its input says."""
    if inputs.num_positions == grads.shape[1]:
        return None
    return (
        f"its output has {grads.shape[1]} positions where its input makes for "
        f"{inputs.num_positions}"
    )
