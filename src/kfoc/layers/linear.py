"""Linear and bilinear layers."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from torch import Tensor, nn

from kfoc.layers.rule import Treatment, bias_alone, extended, treatment
from kfoc.samples.inputs import Inputs, Rows


@treatment.register
def _linear(module: nn.Linear) -> Treatment:
    return linear(module)


def linear(module: nn.Module, weight: str = "weight", bias: str = "bias") -> Treatment:
    """The treatment of a linear map of (N, ..., in) whose parameters have these names."""
    has_bias, parameters = extended(module, weight, bias)
    if parameters == (bias,):
        return replace(bias_alone(bias, channel_first=False), features=(1, 1))
    inputs = partial(_rows, constant=1.0 if has_bias else None)
    return Treatment(inputs, _by_position, parameters, features=(1, 1))


def _rows(values: Tensor, constant: float | None) -> Inputs:
    if values.ndim < 2:
        raise ValueError(f"its input must be (N, ..., features), found {tuple(values.shape)}")
    return Rows(_by_position(values), constant)


def _by_position(values: Tensor) -> Tensor:
    """(N, ..., n) to (N, T, n)."""
    shape = values.shape
    return values[:, None] if len(shape) == 2 else values.reshape(shape[0], -1, shape[-1])


@treatment.register
def _bilinear(module: nn.Bilinear) -> Treatment:
    """`y_o = x1^T W_o x2` is linear in the outer product of its two inputs."""

    def value(args: tuple, kwargs: dict) -> Tensor:
        first, second = (*args, *(kwargs[k] for k in ("input1", "input2") if k in kwargs))
        return (first[..., :, None] * second[..., None, :]).flatten(-2)

    return replace(linear(module), value=value)
