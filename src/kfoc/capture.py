"""Records what layers see in a forward pass, and the derivatives by what they put out."""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from kfoc.attention import Inlined, part_name
from kfoc.graph import Graph, used_elsewhere
from kfoc.layers import Treatment, Unsupported, first_argument, joined
from kfoc.per_sample import Region
from kfoc.samples import Direct, Grouped, Inputs, LayerSamples, Samples, magnitude
from kfoc.selection import Selection


@dataclass
class Call:
    """One call of a module: its input, and where in the graph its output came from.

    The edge is taken before anything acts on the output in place (an in-place ReLU would turn the
    output tensor into its own result), and derivatives are asked for at the edge: that needs no
    weight gradients.
    """

    treatment: Treatment
    value: Tensor
    version: int
    edge: GradientEdge
    output_shape: torch.Size
    output_dtype: torch.dtype
    group: int | None = None  # of the layer's outputs, where calls make up one group each


@dataclass
class Record:
    """What a forward pass left: the calls of every watched layer, in order, and more.

    Attributes:
        calls: layer name -> its calls.
        regions: block name -> where the parameters that no treatment covers met the samples.
        problems: layer name -> what was wrong with a call that could not be recorded.
        closed: after the forward pass. Checkpointed layers run again in the backward pass.
    """

    calls: dict[str, list[Call]] = field(default_factory=dict)
    regions: dict[str, Region] = field(default_factory=dict)
    problems: dict[str, str] = field(default_factory=dict)
    closed: bool = False

    def clear(self) -> None:
        """Forget everything, and record."""
        self.calls.clear()
        self.regions.clear()
        self.problems.clear()
        self.closed = False

    def add(
        self, name: str, treatment: Treatment, value: Any, output: Any, group: int | None = None
    ) -> None:
        """Record one call, or why that is impossible."""
        if self.closed:
            return
        for what, found in (("input", value), ("output", output)):
            if not isinstance(found, Tensor):
                self.problems[name] = f"its {what} must be a tensor, found {type(found).__name__}"
                return
        if output.grad_fn is None:
            # Nothing is missed, as its gradient is zero; but if that is all, it has no block.
            self.problems.setdefault(name, "its output carries no gradient (torch.no_grad()?)")
            return
        edge = get_gradient_edge(output)
        version = value._version
        call = Call(treatment, value.detach(), version, edge, output.shape, output.dtype, group)
        self.calls.setdefault(name, []).append(call)

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
def captured(selection: Selection) -> Iterator[Record]:
    """Watch the selected layers while the context lasts.

    Every hook is gone when it ends, however it ends.
    """
    record = Record()
    handles = []
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


def _checker(name: str) -> Callable[..., None]:
    def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
        value = first_argument(args, kwargs)
        if isinstance(value, Tensor) and not value.is_floating_point():
            raise _problem(
                name,
                f"its input is {value.dtype}, not floating point: convert it, e.g. by .float()",
            )

    return hook


def _recorder(record: Record, name: str, treatment: Treatment) -> Callable[..., None]:
    def hook(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        record.add(name, treatment, treatment.value(args, kwargs), output)

    return hook


def _replayer(
    record: Record, selection: Selection, name: str, whole: Inlined
) -> Callable[..., Any]:
    """A hook that puts a module's replayed output in the place of its own, if they agree.

    It takes the same steps again when a checkpointed region runs again, as that has to.
    """
    names = {part: part_name(name, part) for part in whole.parts}
    treatments = {part: selection.treatments.get(full) for part, full in names.items()}

    def hook(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
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
    reasons = {
        name: reason
        for name, reason in record.problems.items()
        if name not in record.calls or not reason.startswith("its output carries no gradient")
    }
    new = {name: calls for name, calls in record.calls.items() if name not in known}
    for name, calls in new.items():
        unfit = next(filter(None, (_unfit(call, len(outputs)) for call in calls)), None)
        if unfit:
            reasons[name] = unfit
    reasons |= not_by_sample(outputs, new)
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


def _unfit(call: Call, num_samples: int) -> str | None:
    """Why a call does not fit its treatment, judged by shapes and a first sample."""
    if call.value.shape[:1] != (num_samples,) or call.output_shape[:1] != (num_samples,):
        wrong = call.value.shape if call.value.shape[:1] != (num_samples,) else call.output_shape
        found = wrong[0] if wrong else "missing"
        return (
            f"its first dimension is {found} in a batch of {num_samples} samples: it must run over "
            "the samples"
        )
    value, treatment = _accumulable(call.value[:1]), call.treatment
    grad = value.new_zeros(1, *call.output_shape[1:])
    try:
        if treatment.direct is not None:
            treatment.direct(value, grad)
            return None
        return _misfit(treatment.inputs(value), treatment.grads(grad)[None])
    except ValueError as error:
        return str(error)


def not_by_sample(outputs: Tensor, called: dict[str, list[Call]]) -> dict[str, str]:
    """Layers whose first dimension has the size of the batch, but is not the samples.

    Only shapes that leave it open are tried, such as (N, N, features): one backward pass from the
    first sample's outputs alone must leave the other rows of a layer's derivative at zero.

    Returns:
        layer name -> the reason not to treat it.
    """
    count = len(outputs)
    doubtful = {
        name: calls
        for name, calls in called.items()
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


def output_gradients(
    outputs: Tensor, cotangents: Iterable[Tensor], record: Record
) -> dict[str, list[list[Tensor | None]]]:
    """Derivatives by every recorded output and every region's edges, for each cotangent.

    Returns:
        layer name -> per call (or edge), per direction, the derivative, or None where there is no
        path.
    """
    places = {name: [call.edge for call in calls] for name, calls in record.calls.items()}
    places |= {name: region.edges for name, region in record.regions.items()}
    edges = [edge for each in places.values() for edge in each]
    found: dict[str, list[list[Tensor | None]]] = {
        name: [[] for _ in each] for name, each in places.items()
    }
    if not edges:
        return found
    pending = iter(cotangents)
    cotangent = next(pending, None)
    while cotangent is not None:
        following = next(pending, None)
        # The last backward pass is known as such, and frees the graph as it goes, unless regions
        # still need theirs.
        retain = following is not None or bool(record.regions)
        grads = torch.autograd.grad(
            outputs, edges, cotangent, retain_graph=retain, allow_unused=True
        )
        remaining = iter(grads)
        for per_call in found.values():
            for directions in per_call:
                directions.append(next(remaining))
        cotangent = following
    return found


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
        raise _problem(name, str(error)) from None
    for what, largest in zip(("input", "output gradient"), samples.magnitudes, strict=True):
        if not math.isfinite(largest):
            raise _problem(name, f"its {what} has values not finite ({largest})")
    return samples


def _of_calls(
    calls: list[Call], grads: list[list[Tensor | None]], num_samples: int
) -> LayerSamples:
    parts: dict[int | None, list[tuple[Inputs, Tensor]]] = {}
    direct: list[Tensor] = []
    for call, directions in zip(calls, grads, strict=True):
        if call.value._version != call.version:
            raise ValueError(
                "its input was changed in place after the layer had used it: clone it first"
            )
        treatment = call.treatment
        if call.value.shape[:1] != (num_samples,) or call.output_shape[:1] != (num_samples,):
            raise ValueError(_unfit(call, num_samples))
        value = _accumulable(call.value)
        present = [_present(grad, call) for grad in directions]
        directions.clear()
        if treatment.direct is not None:
            direct.append(torch.stack([treatment.direct(value, grad) for grad in present]))
            continue
        inputs = treatment.inputs(value)
        shaped = [treatment.grads(grad) for grad in present]
        stacked = shaped[0][None] if len(shaped) == 1 else torch.stack(shaped)
        parts.setdefault(call.group, []).append((inputs, stacked))
        present.clear()
        shaped.clear()
    if direct:
        return Direct(sum(direct[1:], direct[0]))
    return _joined(parts, calls[0].treatment.groups)


def _joined(parts: dict[int | None, list[tuple[Inputs, Tensor]]], groups: int) -> LayerSamples:
    """The samples of a layer, from those of its calls, by the group that the calls are of."""
    for inputs, grads in [part for each in parts.values() for part in each]:
        misfit = _misfit(inputs, grads)
        if misfit:
            raise ValueError(misfit)
    if None in parts:
        if len(parts) > 1:
            raise ValueError("it is called as self-attention and as cross-attention")
        return joined(parts[None], groups)
    return Grouped(tuple(Samples.side_by_side(parts[group]) for group in sorted(parts)))  # type: ignore[type-var]


def _misfit(inputs: Inputs, grads: Tensor) -> str | None:
    """What is wrong where a call's output has other positions than its input says."""
    if inputs.num_positions == grads.shape[2]:
        return None
    return (
        f"its output has {grads.shape[2]} positions where its input makes for "
        f"{inputs.num_positions}"
    )


def _accumulable(tensor: Tensor) -> Tensor:
    """Half precision squares to nothing: factors are accumulated in float32 at least."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def _present(grad: Tensor | None, call: Call) -> Tensor:
    if grad is None:  # the outputs do not depend on this call
        return call.value.new_zeros(call.output_shape, dtype=call.output_dtype).to(
            _accumulable(call.value).dtype
        )
    return _accumulable(grad)
