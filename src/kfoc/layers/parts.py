"""A layer's parameters as layers of their own: weight and bias apart."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from kfoc.layers.rule import Treatment, Unsupported
from kfoc.samples.inputs import Inputs, Rows
from kfoc.samples.patches import Patches


def part_of(whole: Treatment, parameter: str) -> Treatment:
    """The treatment of one of a layer's parameters alone.

    Raises:
        Unsupported: the layer's treatment does not cover it, or cannot be taken apart.
    """
    if parameter not in whole.parameters:
        raise Unsupported("the treatment of its layer does not cover it")
    if len(whole.parameters) == 1:
        return whole
    place, together = whole.parameters.index(parameter), whole.direct
    if together is not None:
        if whole.layout != "stacked":
            raise Unsupported("the treatment of its layer cannot be taken apart")

        def column(value: Tensor, grad: Tensor) -> Tensor:
            return together(value, grad)[..., place : place + 1]

        return replace(whole, parameters=(parameter,), direct=column)
    if not place:
        return replace(
            whole, parameters=(parameter,), inputs=lambda values: _unextended(whole.inputs(values))
        )
    # A bias is a linear map of a constant 1, whose gradient is the sum over positions of g.
    return replace(
        whole,
        inputs=lambda values: Rows(values.new_ones(len(values), 1, 1)),
        grads=lambda grad: whole.grads(grad).sum(1, keepdim=True),
        parameters=(parameter,),
        groups=1,
        layout="stacked",
    )


def _unextended(inputs: Inputs) -> Inputs:
    """The same inputs without the column of ones of a bias."""
    if isinstance(inputs, Patches | Rows) and inputs.constant is not None:
        return replace(inputs, constant=None)
    return inputs.with_tensor(inputs.tensor[..., :-1])
