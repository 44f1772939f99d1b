"""Records what layers see in a forward pass, and the derivatives by what they put out."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from kfoc.layers import Treatment, joined
from kfoc.samples import Direct, Inputs, LayerSamples, magnitude


@dataclass
class Call:
    """One call of a module: its input, and where in the graph its output came from.

    The edge is taken before anything acts on the output in place (an in-place ReLU would turn the
    output tensor into its own result), and derivatives are asked for at the edge: that needs no
    weight gradients.
    """

    value: Tensor
    version: int
    edge: GradientEdge
    output_shape: torch.Size
    output_dtype: torch.dtype


@dataclass
class Record:
    """The calls of every watched layer since the last `clear`, in order."""

    calls: dict[str, list[Call]] = field(default_factory=dict)

    def clear(self) -> None:
        self.calls.clear()

    def first_not_finite(self) -> str | None:
        """What is wrong with the first watched layer whose input is not finite, if there is one."""
        for name, calls in self.calls.items():
            for call in calls:
                largest = magnitude(call.value)
                if not math.isfinite(largest):
                    return str(_problem(name, f"its input has values not finite ({largest})"))
        return None


def _problem(layer: str, what: str) -> ValueError:
    return ValueError(f"layer {layer!r}: {what}")


@contextmanager
def captured(modules: dict[str, nn.Module]) -> Iterator[Record]:
    """Watch `modules` while the context lasts; every hook is gone when it ends, however it ends."""
    record = Record()
    handles = []
    try:
        for name, module in modules.items():
            handles.append(module.register_forward_pre_hook(_checker(name), with_kwargs=True))
            hook = _recorder(record, name)
            handles.append(module.register_forward_hook(hook, with_kwargs=True))
        yield record
    finally:
        for handle in handles:
            handle.remove()
        record.clear()


def _checker(name: str) -> Callable[..., None]:
    def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
        value = args[0] if args else kwargs.get("input")
        if not isinstance(value, Tensor):
            raise _problem(name, f"its input must be a tensor, found {type(value).__name__}")
        if not value.is_floating_point():
            raise _problem(
                name,
                f"its input is {value.dtype}, not floating point: convert it, e.g. by .float()",
            )

    return hook


def _recorder(record: Record, name: str) -> Callable[..., None]:
    def hook(module: nn.Module, args: tuple, kwargs: dict, output: Tensor) -> None:
        value = args[0] if args else kwargs["input"]
        if output.grad_fn is None:
            raise _problem(
                name,
                "its output carries no gradient: the model must not run under torch.no_grad() or "
                "torch.inference_mode()",
            )
        call = Call(
            value.detach(), value._version, get_gradient_edge(output), output.shape, output.dtype
        )
        record.calls.setdefault(name, []).append(call)

    return hook


def used_elsewhere(
    outputs: Tensor, record: Record, modules: dict[str, nn.Module]
) -> dict[str, str]:
    """Layers whose parameters take part in the outputs more often than the layers were called.

    What other uses contribute to the gradient would be missed without a word.

    Returns:
        layer name -> the reason not to treat it.
    """
    uses = Counter(_leaves(outputs))
    reasons = {}
    for name, calls in record.calls.items():
        for parameter_name, parameter in modules[name].named_parameters(recurse=False):
            if uses[id(parameter)] > len(calls):
                reasons[name] = f"its {parameter_name} is used outside of it as well"
    return reasons


def not_by_sample(outputs: Tensor, record: Record) -> dict[str, str]:
    """Layers whose first dimension has the size of the batch, but is not the samples.

    Only shapes that leave it open are tried, such as (N, N, features): one backward pass from the
    first sample's outputs alone must leave the other rows of a layer's derivative at zero.

    Returns:
        layer name -> the reason not to treat it.
    """
    count = len(outputs)
    doubtful = {
        name: calls
        for name, calls in record.calls.items()
        if count > 1 and any(call.value.shape[:2] == (count, count) for call in calls)
    }
    if not doubtful:
        return {}
    cotangent = torch.zeros_like(outputs)
    # Different weights for different outputs: equal ones cancel in a softmax.
    cotangent[0] = torch.linspace(0.5, 1.5, outputs[0].numel()).to(outputs).view(outputs[0].shape)
    edges = [call.edge for calls in doubtful.values() for call in calls]
    grads = iter(
        torch.autograd.grad(outputs, edges, cotangent, retain_graph=True, allow_unused=True)
    )
    reasons = {}
    for name, calls in doubtful.items():
        for grad in [next(grads) for _ in calls]:
            if grad is not None and len(grad) == count and grad[1:].any():
                reasons[name] = "its first dimension does not run over the samples (batch_first?)"
    return reasons


def _leaves(outputs: Tensor) -> Iterator[int]:
    """Identities of the leaf tensors that the graph of `outputs` ends in, one for every use.

    Under autocast a leaf is cast once for all its uses: uses of the cast are uses of the leaf.
    """
    waiting: list[Any] = [outputs.grad_fn]
    seen = set(waiting)
    while waiting:
        for node, _ in waiting.pop().next_functions:
            leaf = _cast_leaf(node) or node
            if hasattr(leaf, "variable"):
                yield id(leaf.variable)
            elif node is not None and node not in seen:
                seen.add(node)
                waiting.append(node)


def _cast_leaf(node: Any) -> Any:
    """The leaf that a node casts to another precision, if it is such a node."""
    if node is None or node.name() != "ToCopyBackward0":
        return None
    source = node.next_functions[0][0]
    return source if hasattr(source, "variable") else None


def output_gradients(
    outputs: Tensor, cotangents: Iterable[Tensor], record: Record
) -> dict[str, list[list[Tensor | None]]]:
    """Derivatives by every recorded output, for each cotangent.

    Returns:
        layer name -> per call, per direction, the derivative, or None where there is no path.
    """
    edges = [call.edge for calls in record.calls.values() for call in calls]
    found: dict[str, list[list[Tensor | None]]] = {
        name: [[] for _ in calls] for name, calls in record.calls.items()
    }
    if not edges:
        return found
    pending = iter(cotangents)
    cotangent = next(pending, None)
    while cotangent is not None:
        following = next(pending, None)
        # The last backward pass is known as such, and frees the graph as it goes.
        grads = torch.autograd.grad(
            outputs, edges, cotangent, retain_graph=following is not None, allow_unused=True
        )
        remaining = iter(grads)
        for per_call in found.values():
            for directions in per_call:
                directions.append(next(remaining))
        cotangent = following
    return found


def take_samples(
    name: str,
    treatment: Treatment,
    calls: list[Call],
    grads: list[list[Tensor | None]],
    num_samples: int,
) -> LayerSamples:
    """One layer's samples of the batch; consumes `grads`, so that each tensor lives no longer.

    Raises:
        ValueError: the layer's first dimension is not the batch, its input was changed in place
            after the call, or there are values that are not finite.
    """
    parts: list[tuple[Inputs, Tensor]] = []
    direct: list[Tensor] = []
    for call, directions in zip(calls, grads, strict=True):
        if call.value._version != call.version:
            raise _problem(
                name, "its input was changed in place after the layer had used it: clone it first"
            )
        if len(call.value) != num_samples or call.output_shape[0] != num_samples:
            raise _problem(
                name,
                f"its first dimension is {call.output_shape[0]} in a batch of {num_samples} "
                "samples: it must run over the samples",
            )
        if treatment.direct is not None:
            value = _accumulable(call.value)
            present = [_present(grad, call) for grad in directions]
            direct.append(torch.stack([treatment.direct(value, grad) for grad in present]))
            directions.clear()
            continue
        try:
            inputs = treatment.inputs(_accumulable(call.value))
        except ValueError as error:
            raise _problem(name, str(error)) from None
        shaped = [treatment.grads(_present(grad, call)) for grad in directions]
        directions.clear()
        parts.append((inputs, shaped[0][None] if len(shaped) == 1 else torch.stack(shaped)))
        shaped.clear()
    samples: LayerSamples
    try:
        samples = Direct(sum(direct[1:], direct[0])) if direct else joined(parts, treatment.groups)
    except ValueError as error:
        raise _problem(name, str(error)) from None
    for what, largest in zip(("input", "output gradient"), samples.magnitudes, strict=True):
        if not math.isfinite(largest):
            raise _problem(name, f"its {what} has values not finite ({largest})")
    return samples


def _accumulable(tensor: Tensor) -> Tensor:
    """Half precision squares to nothing: factors are accumulated in float32 at least."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def _present(grad: Tensor | None, call: Call) -> Tensor:
    if grad is None:  # the outputs do not depend on this call
        return call.value.new_zeros(call.output_shape, dtype=call.output_dtype).to(
            _accumulable(call.value).dtype
        )
    return _accumulable(grad)
