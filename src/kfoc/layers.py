"""From a module to its samples: one small function a layer family, open to the user's own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import singledispatch
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from kfoc.samples import Inputs, Patches, Rows, Samples


class Unsupported(Exception):  # noqa: N818  (a reason, not a failure)
    """Why a layer cannot be treated exactly; the message ends up in `Curvature.skipped`."""


@dataclass(frozen=True)
class Treatment:
    """How one module becomes samples.

    Attributes:
        inputs: the module's input in one call, (N, ...), to a's of shape (N, T, i).
        grads: a derivative by the module's output in one call, (N, ...), to g's (N, T, o).
        parameters: the names of the module's parameters that make up `[W | b]`.
    """

    inputs: Callable[[Tensor], Inputs]
    grads: Callable[[Tensor], Tensor]
    parameters: tuple[str, ...]


@singledispatch
def treatment(module: nn.Module) -> Treatment:
    """The treatment of a module. Raises Unsupported with the reason where there is none."""
    raise Unsupported(f"no treatment for {type(module).__name__} layers")


def checked_treatment(module: nn.Module) -> Treatment:
    """The treatment of a module whose forward and parameters are what its class says.

    A subclass may compute anything, and a reparametrised weight is not a parameter: both would
    get wrong numbers from the rule of their base class.
    """
    rule = treatment.dispatch(type(module))
    family: Any = next((cls for cls in type(module).__mro__ if cls in treatment.registry), object)
    if family is not object and type(module).forward is not family.forward:
        raise Unsupported(f"{type(module).__name__} overrides the forward of {family.__name__}")
    found = rule(module)
    own = dict(module.named_parameters(recurse=False))
    missing = [name for name in found.parameters if name not in own]
    if missing:
        raise Unsupported(f"its {missing[0]} is not a parameter of its own (reparametrised?)")
    return found


def extended(module: nn.Module) -> tuple[bool, tuple[str, ...]]:
    """Whether [W | b] has a bias column, and its parameters: the trained ones alone."""
    weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
    if weight is not None and not weight.requires_grad:
        raise Unsupported("its weight is frozen (requires_grad is False)")
    trained_bias = bias is not None and bias.requires_grad
    return trained_bias, ("weight", "bias") if trained_bias else ("weight",)


@treatment.register
def _linear(module: nn.Linear) -> Treatment:
    has_bias, parameters = extended(module)

    def inputs(values: Tensor) -> Inputs:
        if values.ndim < 2:
            raise ValueError(f"its input must be (N, ..., features), found {tuple(values.shape)}")
        rows = values.reshape(len(values), -1, values.shape[-1])
        return Rows(functional.pad(rows, (0, 1), value=1.0) if has_bias else rows)

    return Treatment(inputs, lambda grad: grad.reshape(len(grad), -1, grad.shape[-1]), parameters)


@treatment.register
def _conv2d(module: nn.Conv2d) -> Treatment:
    has_bias, parameters = extended(module)
    if module.groups != 1:
        raise Unsupported(f"grouped convolutions (groups={module.groups}) have no treatment yet")
    if isinstance(module.padding, str):
        total = [d * (k - 1) for d, k in zip(module.dilation, module.kernel_size, strict=True)]
        if module.padding == "valid":
            total = [0] * len(total)
        # "same" pads the odd pixel at the end, as torch does.
        sides = [(t // 2, t - t // 2) for t in total]
    else:
        sides = [(p, p) for p in module.padding]
    pad = [amount for pair in reversed(sides) for amount in pair]
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode

    def inputs(values: Tensor) -> Inputs:
        if values.ndim != 2 + len(sides):
            raise ValueError(f"its input must be (N, C, H, W), found {tuple(values.shape)}")
        padded = functional.pad(values, pad, mode=mode) if any(pad) else values
        constant = 1.0 if has_bias else None
        return Patches(padded, module.kernel_size, module.stride, module.dilation, constant)

    return Treatment(inputs, lambda grad: grad.flatten(2).mT, parameters)


def joined(parts: list[tuple[Inputs, Tensor]]) -> Samples:
    """Samples of a module called several times in one forward: positions side by side, exactly.

    Args:
        parts: per call, the inputs (N, T, i) and the gradients (S, N, T, o).
    """
    if len(parts) == 1:
        return Samples(*parts[0])
    rows = [part.rows(0, part.num_samples) for part, _ in parts]
    return Samples(Rows(torch.cat(rows, 1)), torch.cat([grads for _, grads in parts], 2))
