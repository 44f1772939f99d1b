"""Samples of layers whose channels fall into groups, and of several calls of one."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from kfoc.linalg.scaling import largest, magnitude, power_of_two, squared
from kfoc.samples.base import LayerSamples
from kfoc.samples.inputs import Inputs
from kfoc.samples.linear import Samples
from kfoc.samples.one_hot import OneHot
from kfoc.samples.patches import Patches


@dataclass(frozen=True)
class Grouped:
    """Samples of a layer whose outputs fall into groups, each with inputs of its own.

    The per-sample gradient of the whole is that of the groups, one above the other.
    """

    groups: tuple[Samples, ...]

    @property
    def num_samples(self) -> int:
        return self.groups[0].num_samples

    @property
    def num_positions(self) -> int:
        return self.groups[0].num_positions

    @property
    def num_directions(self) -> int:
        return self.groups[0].num_directions

    @property
    def grads(self) -> Tensor:
        """Of the first group: for dtype and device."""
        return self.groups[0].grads

    @property
    def shape(self) -> tuple[int, int]:
        o, i = self.groups[0].shape
        return len(self.groups) * o, i

    @cached_property
    def magnitudes(self) -> tuple[float, float]:
        inputs, grads = zip(*(group.magnitudes for group in self.groups), strict=True)
        return largest(inputs), largest(grads)

    def gradients(self, start: int, stop: int) -> Tensor:
        return torch.cat([group.gradients(start, stop) for group in self.groups], 2)

    def rescaled(self) -> tuple[Grouped, float]:
        """As `Samples.rescaled`, with the same scales for all groups."""
        scales = [power_of_two(size) for size in self.magnitudes]
        groups = tuple(group.scaled_down(*scales) for group in self.groups)
        return Grouped(groups), squared(scales[0] * scales[1]) if all(self.magnitudes) else 0.0

    def silent(self, count: int) -> Grouped:
        return Grouped(tuple(group.silent(count) for group in self.groups))

    def of_directions(self, chosen: slice) -> Grouped:
        return Grouped(tuple(group.of_directions(chosen) for group in self.groups))


@dataclass(frozen=True)
class Depthwise:
    """Samples of a layer whose groups have one output each, as a depthwise convolution's.

    With a `left` of 1 x 1, the optimal block of a group is its F, the (i, i) second moment of the
    rows of X: nothing is to be solved, and all groups are taken together.

    Attributes:
        calls: inputs of all groups and gradients (S, N, T, o), per call of the layer.
    """

    calls: tuple[tuple[Patches, Tensor], ...]

    @property
    def num_samples(self) -> int:
        return self.calls[0][0].num_samples

    @property
    def num_positions(self) -> int:
        """As many as there are inputs to unfold for an output: for the size of chunks."""
        return self.calls[0][0].num_positions * self.shape[0]

    @property
    def num_directions(self) -> int:
        return self.grads.shape[0]

    @property
    def grads(self) -> Tensor:
        """Of the first call: for dtype and device."""
        return self.calls[0][1]

    @property
    def shape(self) -> tuple[int, int]:
        inputs, outputs = self.calls[0][0], self.grads.shape[3]
        bias = inputs.constant is not None
        return outputs, (inputs.size - bias) // outputs + bias

    @cached_property
    def magnitudes(self) -> tuple[float, float]:
        inputs, grads = zip(*self.calls, strict=True)
        return largest([each.magnitude() for each in inputs]), largest([*map(magnitude, grads)])

    def gradients(self, start: int, stop: int) -> Tensor:
        parts = [self._of_call(inputs, grads[:, start:stop], start) for inputs, grads in self.calls]
        return sum(parts[1:], parts[0])

    @staticmethod
    def _of_call(inputs: Patches, grads: Tensor, start: int) -> Tensor:
        count, positions, outputs = grads.shape[1:]
        columns = replace(inputs, constant=None).columns(start, start + count)
        rows = columns.view(outputs, -1, count, positions).permute(2, 0, 3, 1)  # (n, o, T, i)
        found = torch.matmul(grads.permute(1, 3, 0, 2), rows)  # (n, o, S, i)
        if inputs.constant is not None:
            total = grads.sum(2).permute(1, 2, 0)[..., None] * inputs.constant
            found = torch.cat([found, total], -1)
        return found.permute(2, 0, 1, 3)

    def rescaled(self) -> tuple[Depthwise, float]:
        """As `Samples.rescaled`."""
        a, g = (power_of_two(size) for size in self.magnitudes)
        calls = tuple(
            (inputs.scaled(1 / a) if a != 1.0 else inputs, grads / g if g != 1.0 else grads)
            for inputs, grads in self.calls
        )
        return Depthwise(calls), squared(a * g) if all(self.magnitudes) else 0.0

    def silent(self, count: int) -> Depthwise:
        """`count` samples without any gradient, of one position and in no memory."""
        inputs = self.calls[0][0]
        channels, zero = inputs.padded.shape[1], self.grads.new_zeros(())
        padded = zero.to(inputs.padded).expand(count, channels, *inputs.spans)
        grads = zero.expand(self.num_directions, count, 1, self.shape[0])
        return Depthwise(((inputs.with_tensor(padded), grads),))

    def of_directions(self, chosen: slice) -> Depthwise:
        return Depthwise(tuple((inputs, grads[chosen]) for inputs, grads in self.calls))

    def grouped(self) -> Grouped:
        """The same, group by group."""
        groups = self.shape[0]
        split = [(inputs.split(groups), grads.chunk(groups, 3)) for inputs, grads in self.calls]
        return Grouped(
            tuple(
                Samples.side_by_side([(inputs[g], grads[g]) for inputs, grads in split])
                for g in range(groups)
            )
        )


def joined(parts: list[tuple[Inputs, Tensor]], groups: int = 1) -> LayerSamples:
    """Samples of a module called several times in one forward: positions side by side, exactly.

    Args:
        parts: per call, the inputs (N, T, i) and the gradients (S, N, T, o).
        groups: how many groups the channels fall into.
    """
    first = parts[0][0]
    if isinstance(first, OneHot):
        tokens = first.with_tensor(torch.cat([part.tensor for part, _ in parts], 1))
        return Samples(tokens, torch.cat([grads for _, grads in parts], 2))
    if groups == 1:
        return Samples.side_by_side(parts)
    calls = tuple((inputs, grads) for inputs, grads in parts if isinstance(inputs, Patches))
    if len(calls) == len(parts) and all(grads.shape[3] == groups for _, grads in calls):
        return Depthwise(calls)
    split = [
        zip(inputs.split(groups), grads.chunk(groups, 3), strict=True)  # type: ignore[attr-defined]
        for inputs, grads in parts
    ]
    each = zip(*split, strict=True)
    return Grouped(tuple(Samples.side_by_side(list(group)) for group in each))
