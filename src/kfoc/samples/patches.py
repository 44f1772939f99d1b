"""A convolution's inputs: patches, unfolded by chunks of samples and never as a whole."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property

from torch import Tensor

from kfoc.linalg.scaling import magnitude
from kfoc.samples.inputs import Rows

# Patches are brought into order a few samples at a time, which stay in the cache: numbers in all.
COPIED = 2**18


@dataclass(frozen=True)
class Patches:
    """Inputs of a convolution: `padded` (N, C, *space), the input after its padding.

    Row t holds the patch under output position t, ordered (channel, *kernel) as the weight is,
    then `constant` where the layer has a bias (1, or the scale that the inputs were brought to).
    """

    padded: Tensor
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    constant: float | None
    flipped: bool = False  # the kernel axes run backwards, as a transposed convolution's do

    @property
    def num_samples(self) -> int:
        return self.padded.shape[0]

    @cached_property
    def spans(self) -> tuple[int, ...]:
        return tuple(d * (k - 1) + 1 for k, d in zip(self.kernel, self.dilation, strict=True))

    @cached_property
    def output_shape(self) -> tuple[int, ...]:
        space = self.padded.shape[2:]
        return tuple(
            (n - span) // step + 1
            for n, span, step in zip(space, self.spans, self.stride, strict=True)
        )

    @property
    def num_positions(self) -> int:
        return math.prod(self.output_shape)

    @property
    def size(self) -> int:
        return self.padded.shape[1] * math.prod(self.kernel) + (self.constant is not None)

    def columns(self, start: int, stop: int) -> Tensor:
        windows = self.padded[start:stop]
        for axis, (span, step) in enumerate(zip(self.spans, self.stride, strict=True), start=2):
            windows = windows.unfold(axis, span, step)
        dims = len(self.kernel)
        every = tuple(slice(None, None, d) for d in self.dilation)
        windows = windows[(slice(None),) * (2 + dims) + every]
        # (n, C, *out, *kernel) -> (C, *kernel, n, *out): one copy, by runs of the last axis.
        order = (1, *range(2 + dims, 2 + 2 * dims), 0, *range(2, 2 + dims))
        windows = windows.permute(order)
        if self.flipped:
            windows = windows.flip(tuple(range(1, 1 + dims)))
        count = stop - start
        columns = windows.new_empty(self.size, count, self.num_positions)
        rows = self.size - (self.constant is not None)
        columns[:rows].view(windows.shape).copy_(windows)
        if self.constant is not None:
            columns[rows] = self.constant
        return columns

    def rows(self, start: int, stop: int) -> Tensor:
        rows = self.padded.new_empty(stop - start, self.num_positions, self.size)
        patches = rows[..., : self.size - (self.constant is not None)]
        channels = self.padded.shape[1]
        patches = patches.view(*rows.shape[:2], channels, -1)
        several = max(1, COPIED // max(1, rows[:1].numel()))
        for first in range(start, stop, several):
            few = self._patches(first, min(first + several, stop))
            patches[first - start : first - start + several].copy_(few.mT)
        if self.constant is not None:
            rows[..., -1] = self.constant
        return rows

    def _patches(self, start: int, stop: int) -> Tensor:
        """(n, T, kernel, C), channels last: patches are then copied by runs of all channels."""
        windows = self.padded[start:stop].movedim(1, -1).contiguous()
        for axis, (span, step) in enumerate(zip(self.spans, self.stride, strict=True), start=1):
            windows = windows.unfold(axis, span, step)  # (n, *out, C, *spans)
        dims = len(self.kernel)
        every = tuple(slice(None, None, d) for d in self.dilation)
        windows = windows[(slice(None),) * (2 + dims) + every]
        if self.flipped:
            windows = windows.flip(tuple(range(2 + dims, 2 + 2 * dims)))
        windows = windows.movedim(1 + dims, -1).contiguous()
        return windows.view(stop - start, self.num_positions, -1, windows.shape[-1])

    def magnitude(self) -> float:
        return max(magnitude(self.padded), abs(self.constant or 0.0))

    def scaled(self, factor: float) -> Patches:
        constant = None if self.constant is None else self.constant * factor
        return replace(self, padded=self.padded * factor, constant=constant)

    def split(self, groups: int) -> list[Patches]:
        """The inputs of each group of channels."""
        return [replace(self, padded=part) for part in self.padded.chunk(groups, 1)]

    @property
    def tensor(self) -> Tensor:
        return self.padded

    def with_tensor(self, tensor: Tensor) -> Patches:
        return replace(self, padded=tensor)

    @property
    def diagonal(self) -> bool:
        return False

    def silent(self, count: int) -> Rows:
        rows = self.size - (self.constant is not None)
        return Rows(self.padded.new_empty(count, 0, rows), self.constant)
