"""What a forward pass leaves behind: the calls of every watched layer."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from kfoc.errors import problem
from kfoc.layers.rule import Treatment
from kfoc.linalg.scaling import magnitude, wide
from kfoc.model.graph import Graph


@dataclass
class Call:
    """One call of a module: its input, and where in the graph its output came from.

    The edge is taken before anything acts on the output in place (an in-place ReLU would turn the
    output tensor into its own result), and derivatives are asked for at the edge: that needs no
    weight gradients.

    Attributes:
        treatment: of the module that was called.
        value: its input.
        version: of the input, which changes when anything writes to it.
        edge: where its output came from; None once derivatives are there, to let the graph go.
        group: of the layer's outputs, where a call is about one group of them.
        passed: whether the backward pass goes through the edge, to that of another call.
        rows: which rows of what came out there are this call's, where it is one of several.
    """

    treatment: Treatment
    value: Tensor
    version: int
    edge: GradientEdge | None
    output_shape: torch.Size
    output_dtype: torch.dtype
    group: int | None = None
    passed: bool = False
    rows: slice | None = None

    def own(self, grad: Tensor | None) -> Tensor | None:
        """The derivative by what the call put out, from that at its edge."""
        return grad if grad is None or self.rows is None else grad[self.rows]

    @property
    def leading(self) -> int:
        """How many leading dimensions count rows."""
        return self.treatment.leading(self.value, self.output_shape)


@dataclass
class Record:
    """What a forward pass left: the calls of every watched layer, in order, and more.

    Attributes:
        calls: layer name -> its calls.
        uses: layer name -> how many operations took each of its parameters.
        loose: block name -> parameters by name that no treatment covers, and that are wanted.
        precision: the coarsest that anything in the pass was computed in.
        problems: layer name -> what was wrong with a call that could not be recorded.
        mute: layers that were called where no gradient is recorded: theirs is zero.
        spread: embeddings of one row of ids for all samples (positions): what they put out is then
            laid out for each sample, so that its derivatives are by sample.
        count: of the samples in the pass, where that matters.
        closed: after the forward pass. Checkpointed layers run again in the backward pass.
        paused: while the model runs for something else: nothing is recorded nor replayed.
        thread: whose calls are recorded. Others may run the model too, or fit it.
    """

    calls: dict[str, list[Call]] = field(default_factory=dict)
    uses: dict[str, tuple[int, ...]] = field(default_factory=dict)
    loose: dict[str, dict[str, nn.Parameter]] = field(default_factory=dict)
    precision: float = 0.0
    problems: dict[str, str] = field(default_factory=dict)
    mute: set[str] = field(default_factory=set)
    spread: set[str] = field(default_factory=set)
    count: int = 0
    closed: bool = False
    paused: bool = False
    thread: int = field(default_factory=threading.get_ident)

    def clear(self) -> None:
        """Forget everything, and record."""
        self.calls.clear()
        self.uses.clear()
        self.loose.clear()
        self.problems.clear()
        self.mute.clear()
        self.closed = False

    def add(
        self,
        name: str,
        treatment: Treatment,
        value: Any,
        output: Any,
        group: int | None = None,
        rows: slice | None = None,
    ) -> None:
        """Record one call, or why that is impossible."""
        if self.closed or self.paused or threading.get_ident() != self.thread:
            return
        for what, found in (("input", value), ("output", output)):
            if not isinstance(found, Tensor):
                self.problems[name] = f"its {what} must be a tensor, found {type(found).__name__}"
                return
        if output.grad_fn is None:
            self.mute.add(name)
            return
        edge = get_gradient_edge(output)
        version = value._version
        shape = output.shape if rows is None else output[rows].shape
        call = Call(treatment, value.detach(), version, edge, shape, output.dtype, group, rows=rows)
        self.calls.setdefault(name, []).append(call)

    def find_precision(self, outputs: Tensor, graph: Graph) -> None:
        """See how coarse the pass was: by what layers put out, and whether anything was cast."""
        calls = [call for calls in self.calls.values() for call in calls]
        self.precision = coarsest([outputs.dtype, *(call.output_dtype for call in calls)])
        if "ToCopyBackward0" in graph.names():  # autocast, perhaps
            self.precision = max(self.precision, torch.finfo(torch.bfloat16).eps)

    def find_passed(self, graph: Graph) -> None:
        """See which calls' edges the backward pass goes through."""
        calls = [call for calls in self.calls.values() for call in calls if call.edge]
        after = graph.after({call.edge.node for call in calls if call.edge})
        for call in calls:
            call.passed = call.edge is not None and call.edge.node in after

    def first_not_finite(self) -> str | None:
        """What is wrong with the first watched layer whose input is not finite, if there is one."""
        for name, calls in self.calls.items():
            for call in calls:
                largest = magnitude(call.value)
                if not math.isfinite(largest):
                    return str(problem(name, f"its input has values not finite ({largest})"))
        return None


def coarsest(dtypes: Iterable[torch.dtype]) -> float:
    """The largest relative rounding error of these types, those of floating point among them."""
    return max((torch.finfo(d).eps for d in dtypes if d.is_floating_point), default=0.0)


def tolerance(precision: float, device: torch.device | None = None) -> float:
    """How far, relative to its size, a sum may be from the same sum in another order."""
    if precision > 1e-4:
        return 8 * precision
    if device is not None and device.type == "cuda" and precision > 1e-8:
        return 1e-2  # TF32 may have been used
    return 1e3 * precision


def present(grad: Tensor | None, call: Call) -> Tensor:
    """The derivative by a call's output; zeros where the outputs do not depend on the call."""
    own = call.own(grad)
    if own is None:
        own = call.value.new_zeros(call.output_shape, dtype=call.output_dtype)
    return wide(own)
