"""Convolutions and transposed convolutions."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional

from kfoc.layers.rule import Treatment, bias_alone, extended, treatment
from kfoc.samples.inputs import Inputs
from kfoc.samples.patches import Patches


def _convolution(module: nn.Conv1d | nn.Conv2d | nn.Conv3d) -> Treatment:
    has_bias, parameters = extended(module)
    if parameters == ("bias",):
        return bias_alone("bias", channel_first=True)
    if isinstance(module.padding, str):
        total = [d * (k - 1) for d, k in zip(module.dilation, module.kernel_size, strict=True)]
        if module.padding == "valid":
            total = [0] * len(total)
        # "same" pads the odd pixel at the end, as torch does.
        sides = [(t // 2, t - t // 2) for t in total]
    else:
        sides = [(p, p) for p in module.padding]
    pad = _flat(sides)
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode

    def inputs(values: Tensor) -> Inputs:
        _check_spatial(values, len(sides))
        padded = functional.pad(values, pad, mode=mode) if any(pad) else values
        constant = 1.0 if has_bias else None
        return Patches(padded, module.kernel_size, module.stride, module.dilation, constant)

    return Treatment(inputs, lambda grad: grad.flatten(2).mT, parameters, module.groups)


def _transposed(module: Any) -> Treatment:
    """A transposed convolution as the convolution that it is, of the input with zeros between.

    Its weight, (in, out / groups, *kernel), is about [W | b] with rows of outputs: W is the weight
    with its first two dimensions swapped within each group, and flattened.
    """
    has_bias, parameters = extended(module)
    if parameters == ("bias",):
        return bias_alone("bias", channel_first=True)
    kernel, stride, dilation = module.kernel_size, module.stride, module.dilation
    before = [
        d * (k - 1) - int(p) for d, k, p in zip(dilation, kernel, module.padding, strict=True)
    ]
    pad = _flat([(b, b + extra) for b, extra in zip(before, module.output_padding, strict=True)])

    def inputs(values: Tensor) -> Inputs:
        _check_spatial(values, len(kernel))
        space = [(n - 1) * s + 1 for n, s in zip(values.shape[2:], stride, strict=True)]
        spread = values.new_zeros(*values.shape[:2], *space)
        every: tuple[Any, ...] = (..., *(slice(None, None, s) for s in stride))
        spread[every] = values
        constant = 1.0 if has_bias else None
        ones = (1,) * len(kernel)
        return Patches(functional.pad(spread, pad), kernel, ones, dilation, constant, flipped=True)

    kind = "transposed_convolution"
    return Treatment(inputs, lambda grad: grad.flatten(2).mT, parameters, module.groups, kind)


for _dims in (nn.Conv1d, nn.Conv2d, nn.Conv3d):
    treatment.register(_dims, _convolution)
for _dims_transposed in (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d):
    treatment.register(_dims_transposed, _transposed)


def _flat(sides: list[tuple[int, int]]) -> list[int]:
    """Padding per axis in the order that `functional.pad` takes: the last axis first."""
    return [amount for pair in reversed(sides) for amount in pair]


def _check_spatial(values: Tensor, dims: int) -> None:
    if values.ndim != 2 + dims:
        raise ValueError(
            f"its input must have {2 + dims} dimensions, samples first, found {tuple(values.shape)}"
        )
