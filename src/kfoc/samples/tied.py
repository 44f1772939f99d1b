"""Samples of a weight that an embedding shares with the linear head of a model."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from kfoc.linalg.scaling import largest, magnitude, power_of_two, squared
from kfoc.samples.inputs import Rows
from kfoc.samples.linear import Samples


@dataclass(frozen=True)
class Tied:
    """Samples of a weight (V, d) that is both an embedding's and a linear head's.

    The per-sample gradient is the sum of the two uses. It lies as the head's, (V, d), or as the
    embedding's, (d, V), where the vocabulary is large and its factor a diagonal: that is `right`.

    Attributes:
        head: of the head as it is by itself, (o, i) = (V, d).
        embedding: of the embedding as it is by itself, (d, V), with its inputs one-hot.
    """

    head: Samples
    embedding: Samples

    @property
    def num_samples(self) -> int:
        return self.head.num_samples

    @property
    def num_positions(self) -> int:
        return self.head.num_positions + self.embedding.num_positions

    @property
    def num_directions(self) -> int:
        return self.head.num_directions

    @property
    def grads(self) -> Tensor:
        """Of the head: for dtype and device."""
        return self.head.grads

    @property
    def shape(self) -> tuple[int, int]:
        return self.embedding.shape if self.diagonal else self.head.shape

    @property
    def diagonal(self) -> bool:
        return self.embedding.diagonal

    @property
    def right_shape(self) -> tuple[int, ...]:
        """As `Samples.right_shape`."""
        return self.shape[1:] * (1 if self.diagonal else 2)

    @property
    def numel(self) -> int:
        return self.head.numel + self.embedding.numel

    def detached_copy(self) -> Tied:
        return Tied(self.head.detached_copy(), self.embedding.detached_copy())

    def part(self, start: int, stop: int) -> Tied:
        return Tied(self.head.part(start, stop), self.embedding.part(start, stop))

    def joins(self, other: Tied) -> bool:
        return self.head.joins(other.head) and self.embedding.joins(other.embedding)

    @staticmethod
    def merged(parts: list[Tied]) -> Tied:
        heads, embeddings = [part.head for part in parts], [part.embedding for part in parts]
        return Tied(Samples.merged(heads), Samples.merged(embeddings))

    @cached_property
    def magnitudes(self) -> tuple[float, float]:
        inputs, grads = self.head.magnitudes
        return inputs, largest((grads, magnitude(self.embedding.grads)))

    def gradients(self, start: int, stop: int) -> Tensor:
        head, embedding = (p.gradients(start, stop) for p in (self.head, self.embedding))
        return embedding.add_(head.mT) if self.diagonal else head.add_(embedding.mT)

    def rescaled(self) -> tuple[Tied, float]:
        """As `Samples.rescaled`, for the gradients alone."""
        scale = power_of_two(self.magnitudes[1])
        parts = (part.scaled_down(1.0, scale) for part in (self.head, self.embedding))
        return Tied(*parts), squared(scale) if self.magnitudes[1] else 0.0

    def silent(self, count: int) -> Tied:
        return Tied(self.head.silent(count), self.embedding.silent(count))

    def of_directions(self, chosen: slice) -> Tied:
        return Tied(self.head.of_directions(chosen), self.embedding.of_directions(chosen))

    def as_positions(self) -> Samples:
        """The same per-sample gradients as sums of outer products, in the rows of the head.

        An embedding's position adds `onehot e^T`, with its derivative e in the place of an input.
        As e differs between directions, every direction has positions of its own, whose one-hot
        rows are zero in the others. Where that takes more positions than the gradient has columns,
        the outer products are those of its columns with unit vectors instead.
        """
        directions, (size, width) = self.num_directions, self.head.shape
        count, called = self.head.num_positions, self.embedding.num_positions
        if count + directions * called > max(width, count + called):
            units = torch.eye(width, dtype=self.grads.dtype, device=self.grads.device)
            every = units.expand(self.num_samples, -1, -1)
            gradients = self.gradients(0, self.num_samples)
            return Samples(Rows(every), gradients if self.diagonal else gradients.mT)
        # Scales move between the two factors of a position, so that both have usual magnitudes.
        scale = power_of_two(magnitude(self.embedding.grads))
        tokens = self.embedding.inputs.rows(0, self.num_samples) * scale
        rows = self.head.inputs.rows(0, self.num_samples)
        inputs = [rows, *(self.embedding.grads / scale)]
        positions = count + directions * called
        grads = self.grads.new_zeros(directions, self.num_samples, positions, size)
        grads[:, :, :count] = self.grads
        for s in range(directions):
            start = count + s * called
            grads[s, :, start : start + called] = tokens
        return Samples(Rows(torch.cat(inputs, 1)), grads)
