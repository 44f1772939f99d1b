"""Samples of linear maps: inputs a and output derivatives g, by sample and position."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from kfoc.linalg.scaling import magnitude, power_of_two, squared
from kfoc.samples.inputs import Inputs, Rows


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
