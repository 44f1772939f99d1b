"""What one layer saw in one batch: inputs a and output derivatives g, by sample and position.

The per-sample gradient of a layer's extended weight `[W | b]` is
`X[s, n] = sum_t g[s,n,t] a[n,t]^T`, and its block of the Fisher is
`F = (1/N) sum_{s,n} vec(X) vec(X)^T`, with `vec` row-major. Inputs come either as a tensor or as
the patches of a convolution, which are unfolded by chunks of samples and never as a whole.
"""

from __future__ import annotations

import cmath
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from kfoc.memory import out_of_memory
from kfoc.scales import power_of_two, squared

# Patches are brought into order a few samples at a time, which stay in the cache: numbers in all.
COPIED = 2**18


class Inputs(Protocol):
    """A layer's inputs, (N, T, i), of which any range of samples can be asked for."""

    @property
    def num_samples(self) -> int: ...

    @property
    def num_positions(self) -> int: ...

    @property
    def size(self) -> int: ...

    def columns(self, start: int, stop: int) -> Tensor:
        """Samples `start` to `stop`, as (i, n, T): the layout in which unfolding is cheapest."""
        ...

    def rows(self, start: int, stop: int) -> Tensor:
        """Samples `start` to `stop`, as (n, T, i), contiguous."""
        ...

    def magnitude(self) -> float:
        """The largest absolute value; NaN where there is one."""
        ...

    def scaled(self, factor: float) -> Inputs:
        """The inputs times `factor`, the column of ones of a bias included."""
        ...

    @property
    def tensor(self) -> Tensor:
        """What the inputs are kept as, samples first."""
        ...

    def with_tensor(self, tensor: Tensor) -> Inputs:
        """Inputs of the same kind, kept as `tensor`."""
        ...

    @property
    def diagonal(self) -> bool:
        """Whether a Kronecker product's right factor is restricted to its diagonal, (i,)."""
        ...

    def silent(self, count: int) -> Inputs:
        """The inputs of `count` samples without any position."""
        ...


@dataclass(frozen=True)
class Rows:
    """Inputs held as a tensor `values` (N, T, i), or (N, T, i - 1) where there is a `constant`.

    The constant is the last column of all rows: that of a bias, 1 (or the scale that the inputs
    were brought to). It is not written out before a range of samples is asked for.
    """

    values: Tensor
    constant: float | None = None

    @property
    def num_samples(self) -> int:
        return self.values.shape[0]

    @property
    def num_positions(self) -> int:
        return self.values.shape[1]

    @property
    def size(self) -> int:
        return self.values.shape[2] + (self.constant is not None)

    def columns(self, start: int, stop: int) -> Tensor:
        return self._whole(start, stop).permute(2, 0, 1)

    def rows(self, start: int, stop: int) -> Tensor:
        return self._whole(start, stop).contiguous()

    def _whole(self, start: int, stop: int) -> Tensor:
        values = self.values[start:stop]
        if self.constant is None:
            return values
        return functional.pad(values, (0, 1), value=self.constant)

    def magnitude(self) -> float:
        return max(magnitude(self.values), abs(self.constant or 0.0))

    def scaled(self, factor: float) -> Rows:
        constant = None if self.constant is None else self.constant * factor
        return Rows(self.values * factor, constant)

    @property
    def tensor(self) -> Tensor:
        return self.values

    def with_tensor(self, tensor: Tensor) -> Rows:
        return replace(self, values=tensor)

    @property
    def diagonal(self) -> bool:
        return False

    def silent(self, count: int) -> Rows:
        return Rows(self.values.new_empty(count, 0, self.values.shape[2]), self.constant)


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


@dataclass(frozen=True)
class Folded:
    """Inputs that came with `each` rows for every sample, one behind the other: windows, frames.

    A sample's positions are those of its rows, in order.
    """

    inner: Inputs  # of (N * each) rows
    each: int

    @property
    def num_samples(self) -> int:
        return self.inner.num_samples // self.each

    @property
    def num_positions(self) -> int:
        return self.inner.num_positions * self.each

    @property
    def size(self) -> int:
        return self.inner.size

    @property
    def constant(self) -> float | None:
        return getattr(self.inner, "constant", None)

    def columns(self, start: int, stop: int) -> Tensor:
        columns = self.inner.columns(start * self.each, stop * self.each)
        return columns.reshape(self.size, stop - start, -1)

    def rows(self, start: int, stop: int) -> Tensor:
        rows = self.inner.rows(start * self.each, stop * self.each)
        return rows.reshape(stop - start, -1, self.size)

    def magnitude(self) -> float:
        return self.inner.magnitude()

    def scaled(self, factor: float) -> Folded:
        return Folded(self.inner.scaled(factor), self.each)

    def split(self, groups: int) -> list[Folded]:
        """The inputs of each group of channels, of patches."""
        parts = self.inner.split(groups)  # type: ignore[attr-defined]
        return [Folded(part, self.each) for part in parts]

    @property
    def tensor(self) -> Tensor:
        return self.inner.tensor.unflatten(0, (-1, self.each))

    def with_tensor(self, tensor: Tensor) -> Folded:
        return Folded(self.inner.with_tensor(tensor.flatten(0, 1)), self.each)

    @property
    def diagonal(self) -> bool:
        return self.inner.diagonal

    def silent(self, count: int) -> Inputs:
        return self.inner.silent(count)


class LayerSamples(Protocol):
    """What every kind of samples of one layer in one batch has."""

    @property
    def num_samples(self) -> int: ...

    @property
    def num_positions(self) -> int:
        """How many outer products a per-sample gradient is the sum of; 0 where it is none."""
        ...

    @property
    def num_directions(self) -> int: ...

    @property
    def grads(self) -> Tensor:
        """For dtype and device."""
        ...

    @property
    def shape(self) -> tuple[int, int]:
        """(o, i)."""
        ...

    @property
    def magnitudes(self) -> tuple[float, float]:
        """The largest absolute values of inputs and gradients; NaN where there is one."""
        ...

    def gradients(self, start: int, stop: int) -> Tensor:
        """Per-sample gradients X, (S, n, o, i), of samples `start` to `stop`."""
        ...

    def rescaled(self) -> tuple[LayerSamples, float]:
        """The samples brought to a magnitude near one, and the factor that F then lacks.

        The factor is 0 where F is, so that it says nothing of the scale of other batches.
        """
        ...

    def silent(self, count: int) -> LayerSamples:
        """`count` samples of the same layer without any gradient."""
        ...

    def of_directions(self, chosen: slice) -> LayerSamples:
        """The same samples in some of the directions, sharing memory."""
        ...


@dataclass(frozen=True)
class Samples:
    """One layer's samples of one batch.

    Attributes:
        inputs: a, (N, T, i).
        grads: g, (S, N, T, o): derivatives of `ln p(y | x)` in S directions, whose squares add up.
        rows_per_sample: how many positions a sample has on average, where some of the T are mere
            padding, zeros in inputs and gradients: K-FAC takes means over positions.
    """

    inputs: Inputs
    grads: Tensor
    rows_per_sample: float | None = None

    @property
    def num_samples(self) -> int:
        return self.inputs.num_samples

    @property
    def num_positions(self) -> int:
        return self.inputs.num_positions

    @property
    def num_directions(self) -> int:
        return self.grads.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        """(o, i)."""
        return self.grads.shape[3], self.inputs.size

    @property
    def diagonal(self) -> bool:
        """Whether a Kronecker product's right factor is restricted to its diagonal."""
        return self.inputs.diagonal

    @property
    def right_shape(self) -> tuple[int, ...]:
        """Of a Kronecker product's right factor: (i, i), or (i,) where it is kept as diagonal."""
        return (self.inputs.size,) * (1 if self.diagonal else 2)

    @cached_property
    def magnitudes(self) -> tuple[float, float]:
        """The largest absolute values of inputs and gradients; NaN where there is one."""
        return self.inputs.magnitude(), magnitude(self.grads)

    @property
    def numel(self) -> int:
        """How many numbers the samples are kept in."""
        return self.inputs.tensor.numel() + self.grads.numel()

    def detached_copy(self) -> Samples:
        """The same samples in memory of their own: a loader may write over its batches."""
        inputs = self.inputs.with_tensor(self.inputs.tensor.clone())
        return replace(self, inputs=inputs, grads=self.grads.clone())

    def part(self, start: int, stop: int) -> Samples:
        """Samples `start` to `stop`, sharing memory."""
        if start == 0 and stop >= self.num_samples:
            return self
        tensor = self.inputs.tensor[start:stop]
        inputs = self.inputs.with_tensor(tensor)
        return replace(self, inputs=inputs, grads=self.grads[:, start:stop])

    def joins(self, other: Samples) -> bool:
        """Whether `merged` can take the two: the same kind of layer call and positions."""
        return (
            type(self.inputs) is type(other.inputs)
            and self.inputs.tensor.shape[1:] == other.inputs.tensor.shape[1:]
            and self.grads.shape[2:] == other.grads.shape[2:]
            and self.num_directions == other.num_directions
        )

    @staticmethod
    def side_by_side(parts: Sequence[tuple[Inputs, Tensor]]) -> Samples:
        """The samples of several calls of a layer, (inputs, grads) each, as those of one."""
        if len(parts) == 1:
            return Samples(*parts[0])
        rows = [part.rows(0, part.num_samples) for part, _ in parts]
        return Samples(Rows(torch.cat(rows, 1)), torch.cat([grads for _, grads in parts], 2))

    @staticmethod
    def merged(parts: list[Samples]) -> Samples:
        """The samples of several batches as those of one."""
        if len(parts) == 1:
            return parts[0]
        tensor = torch.cat([part.inputs.tensor for part in parts])
        grads = torch.cat([part.grads for part in parts], 1)
        return Samples(parts[0].inputs.with_tensor(tensor), grads)

    def gradients(self, start: int, stop: int) -> Tensor:
        """Per-sample gradients X, (S, n, o, i), of samples `start` to `stop`."""
        columns = self.inputs.columns(start, stop).permute(1, 2, 0)  # (n, T, i)
        grads = self.grads[:, start:stop]
        if self.num_directions == 1:
            return torch.bmm(grads[0].mT, columns)[None]
        return torch.matmul(grads.mT, columns)

    def rescaled(self) -> tuple[Samples, float]:
        """The samples brought to a magnitude near one, and the factor that F then lacks.

        The plans square inner products, so gradients of 1e-11, as a converged float32 network has
        them, would vanish in them. Scales are powers of two: nothing is rounded.
        """
        input_scale, grad_scale = (power_of_two(largest) for largest in self.magnitudes)
        scale = squared(input_scale * grad_scale) if all(self.magnitudes) else 0.0
        return self.scaled_down(input_scale, grad_scale), scale

    def scaled_down(self, input_scale: float, grad_scale: float) -> Samples:
        inputs, grads = self.inputs, self.grads
        if input_scale != 1.0:
            inputs = inputs.scaled(1 / input_scale)
        if grad_scale != 1.0:
            grads = grads / grad_scale
        return replace(self, inputs=inputs, grads=grads)

    def silent(self, count: int) -> Samples:
        """`count` samples of the same layer without any position, so without any gradient."""
        grads = self.grads.new_empty(self.num_directions, count, 0, self.shape[0])
        return Samples(self.inputs.silent(count), grads)

    def of_directions(self, chosen: slice) -> Samples:
        return replace(self, grads=self.grads[chosen])


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
        each = [group.magnitudes for group in self.groups]
        # NaN where any is: max() would drop it.
        worst = [sum(m) if not math.isfinite(sum(m)) else max(m) for m in zip(*each, strict=True)]
        return worst[0], worst[1]

    def gradients(self, start: int, stop: int) -> Tensor:
        return torch.cat([group.gradients(start, stop) for group in self.groups], 2)

    def rescaled(self) -> tuple[Grouped, float]:
        """As `Samples.rescaled`, with the same scales for all groups."""
        scales = [power_of_two(largest) for largest in self.magnitudes]
        groups = tuple(group.scaled_down(*scales) for group in self.groups)
        return Grouped(groups), squared(scales[0] * scales[1]) if all(self.magnitudes) else 0.0

    def silent(self, count: int) -> Grouped:
        return Grouped(tuple(group.silent(count) for group in self.groups))

    def of_directions(self, chosen: slice) -> Grouped:
        return Grouped(tuple(group.of_directions(chosen) for group in self.groups))


@dataclass(frozen=True)
class Direct:
    """Per-sample gradients themselves, for layers whose gradient is no sum of outer products.

    Attributes:
        grads: X, (S, N, o, i): for a normalisation layer a row per feature, and a column each for
            its scale and its shift.
    """

    grads: Tensor

    @property
    def num_samples(self) -> int:
        return self.grads.shape[1]

    @property
    def num_positions(self) -> int:
        return 0

    @property
    def num_directions(self) -> int:
        return self.grads.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        return self.grads.shape[2], self.grads.shape[3]

    @cached_property
    def magnitudes(self) -> tuple[float, float]:
        return 1.0, magnitude(self.grads)

    def gradients(self, start: int, stop: int) -> Tensor:
        return self.grads[:, start:stop]

    def rescaled(self) -> tuple[Direct, float]:
        scale = power_of_two(self.magnitudes[1])
        scaled = Direct(self.grads / scale) if scale != 1.0 else self
        return scaled, squared(scale) if all(self.magnitudes) else 0.0

    def silent(self, count: int) -> Direct:
        return Direct(self.grads.new_zeros(self.num_directions, count, *self.shape))

    def of_directions(self, chosen: slice) -> Direct:
        return Direct(self.grads[chosen])


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
        each = [(inputs.magnitude(), magnitude(grads)) for inputs, grads in self.calls]
        worst = [sum(m) if not math.isfinite(sum(m)) else max(m) for m in zip(*each, strict=True)]
        return worst[0], worst[1]

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
        a, g = (power_of_two(largest) for largest in self.magnitudes)
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


def chunks(samples: LayerSamples, floats_per_sample: int, limit: int) -> Iterator[tuple[int, int]]:
    """Ranges of samples, each of at most `limit` floats, but of one sample at least."""
    count = samples.num_samples
    size = max(1, limit // max(1, floats_per_sample))
    for start in range(0, count, size):
        yield start, min(start + size, count)


def gradient_chunks(samples: LayerSamples, limit: int) -> Iterator[Tensor]:
    """Per-sample gradients X, (S, n, o, i), by chunks whose temporaries hold `limit` floats.

    Where memory does not suffice for a chunk, the rest goes by chunks of half its samples.
    """
    o, i = samples.shape
    per_sample = max(samples.num_directions * o * i, samples.num_positions * i)
    size, start = max(1, limit // max(1, per_sample)), 0
    while start < samples.num_samples:
        stop = min(start + size, samples.num_samples)
        found = _formed(samples, start, stop)
        if found is None:
            size = (stop - start + 1) // 2
            continue
        yield found
        del found  # or the next chunk would be formed beside it
        start = stop


def _formed(samples: LayerSamples, start: int, stop: int) -> Tensor | None:
    """The per-sample gradients; None where several do not fit into memory together."""
    try:
        return samples.gradients(start, stop)
    except (RuntimeError, MemoryError) as error:
        if stop - start == 1 or not out_of_memory(error):
            raise
    # Outside of the handler, whose traceback keeps alive what had been formed so far.
    return None


def magnitude(values: Tensor) -> float:
    """The largest absolute value of a tensor, without a copy of it; NaN where there is one."""
    if not values.numel():
        return 0.0
    low, high = torch.aminmax(values)
    if values.device.type == "cpu":  # elsewhere every number that is read waits for the device
        return max(high.item(), -low.item())
    return torch.maximum(-low, high).item()


def finite(values: Tensor) -> bool:
    """Whether all are. Their sum is not where one is not, and hardly ever where all are."""
    return cmath.isfinite(values.sum().item()) or bool(values.isfinite().all())
