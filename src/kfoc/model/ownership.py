"""Whose rows a layer's are: rules by order, and owners found by weighted backward passes.

A call's input and output consist of rows, and every row with a gradient belongs to one sample, or
mixes several. See `proof` for why the ratio of a row's gradients in two passes tells.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kfoc.model.trace import Call, tolerance

# Powers of two that weights may be without leaving the range of a dtype.
_DIGITS = {torch.float16: 8}
_MANY_DIGITS = 64

# One layer's derivatives: per call, per direction; None where there is no path.
Directions = list[list[Tensor | None]]


@dataclass(frozen=True)
class InOrder:
    """The samples lie along one dimension of the rows, in order, `each` entries for every one."""

    axis: int = 0
    each: int = 1

    def fits(self, rows: Sequence[int], count: int) -> bool:
        """Whether leading dimensions of this shape can be those of `count` samples."""
        return len(rows) > self.axis and rows[self.axis] == count * self.each


@dataclass(frozen=True)
class Scattered:
    """Rows belong to samples in no order that is known: `owners` (M,), -1 for nobody's.

    Attributes:
        owners: None in a rule, before those of a batch are known.
    """

    owners: Tensor | None = None


@dataclass(frozen=True)
class Unseen:
    """No gradient has reached these rows yet, and without one they say nothing of their owners."""


Rule = InOrder | Scattered | Unseen


@dataclass(frozen=True)
class Weights:
    """Powers of two that tell samples apart: scaling by them rounds nothing.

    Attributes:
        count: of the samples.
        base: how many different weights there are.
        passes: (N,) each: a sample's weights in all passes are the digits of its number.
    """

    count: int
    base: int
    passes: tuple[Tensor, ...]

    @staticmethod
    def of(count: int, dtypes: Iterable[torch.dtype]) -> Weights:
        """For gradients of these types."""
        base = min(_DIGITS.get(dtype, _MANY_DIGITS) for dtype in dtypes)
        base = min(base, max(count, 2))
        powers = torch.tensor([2.0**digit for digit in range(-(base // 2), base - base // 2)])
        numbers, passes = torch.arange(count), 0
        while not passes or base**passes < count:
            passes += 1
        return Weights(
            count, base, tuple(powers[numbers // base**place % base] for place in range(passes))
        )

    def cotangents(self, cotangent: Tensor) -> list[Tensor]:
        """Each sample's cotangent times its weight, pass by pass."""
        return [cotangent * _along(each, cotangent, 0) for each in self.passes]


def _along(values: Tensor, like: Tensor, axis: int) -> Tensor:
    """Values (n,) of a dimension of a tensor, in its type, to be multiplied with it."""
    return values.to(like).view(-1, *[1] * (like.ndim - axis - 1))


def in_order(grad: Tensor, tagged: Sequence[Tensor], weights: Weights) -> int:
    """How many rows in order every sample has along the first dimension; 0: none is proved.

    Args:
        grad: by the cotangents as they are; not zero.
        tagged: the same by those that are weighted, a pass for each of the weights.
    """
    if len(grad) % weights.count:
        return 0
    each = len(grad) // weights.count
    for found, own in zip(tagged, weights.passes, strict=True):
        spread = own.repeat_interleave(each) if each > 1 else own
        if not torch.equal(found, grad * _along(spread, grad, 0)):
            return 0
    return each


def owners(grad: Tensor, tagged: Sequence[Tensor], weights: Weights) -> Tensor:
    """Whose every row is: (M,), -1 where there is no gradient, -2 where samples are mixed.

    Args:
        grad: (M, n), by the cotangents as they are.
        tagged: the same by those that are weighted, a pass for each of the weights.
    """
    size = grad.abs().amax(1) if grad.shape[1] else grad.new_zeros(len(grad))
    alive = (size > 0) & size.isfinite()
    divisor = torch.where(alive, size, 1).double()[:, None]
    rows = grad.double() / divisor
    allowed, base = tolerance(torch.finfo(grad.dtype).eps), weights.base
    number = torch.zeros(len(grad), dtype=torch.long, device=grad.device)
    mixed = torch.zeros_like(alive)
    for place, each in enumerate(tagged):
        scaled = each.double() / divisor
        ratio = (scaled * rows).sum(1) / (rows * rows).sum(1).clamp_min(1e-30)
        exponent = torch.log2(ratio.clamp_min(1e-30)).round()
        left = (torch.ldexp(scaled, -exponent[:, None]) - rows).abs().amax(1)
        digit = exponent.long() + base // 2
        mixed |= (left > allowed) | ~left.isfinite() | (digit < 0) | (digit >= base)
        number += digit.clamp(0, base - 1) * base**place
    mixed |= number >= weights.count
    return torch.where(alive, torch.where(mixed, -2, number), -1)


def by_rows(grad: Tensor, call: Call) -> Tensor:
    """A derivative by what a call put out, as (M, n): a row for every row of the call."""
    return grad.reshape(row_count(call), math.prod(call.output_shape[call.leading :]))


def rows_shape(call: Call) -> tuple[int, ...]:
    """The leading dimensions of a call that count its rows."""
    return tuple(call.output_shape[: call.leading])


def row_count(call: Call) -> int:
    return math.prod(rows_shape(call))
