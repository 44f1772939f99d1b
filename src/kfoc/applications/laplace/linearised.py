"""Covariances and variances of the outputs of a model linearised at its trained parameters."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kfoc.applications.laplace import last_linear
from kfoc.curvature.damped import DampedCurvature
from kfoc.model.functional import Forward, count_samples, sliced
from kfoc.model.sample_gradients import chunks, jacobians
from kfoc.parameters.layout import Layout, covered

# Of some samples of a batch, by each of several posteriors.
Chunks = Iterator[tuple[slice, list[Tensor]]]


@dataclass(frozen=True)
class Linearised:
    """The model `f(x) + J (parameters - trained)`, with the Jacobians J of single samples.

    Attributes:
        forward: the model.
        layouts: the covered parameters, by layer.
        chunk_size: samples whose Jacobians are held at once; None: as 128 MiB allow.
    """

    forward: Forward
    layouts: Mapping[str, Layout]
    chunk_size: int | None = None

    def covariances(
        self, inputs: Any, outputs: Tensor, posteriors: Sequence[DampedCurvature]
    ) -> Chunks:
        """`J B^-1 J^T`, (n, K, K), chunk by chunk.

        Args:
            inputs: of N samples.
            outputs: the model's, (N, ...), with K numbers for each sample.
            posteriors: one precision B or several.
        """
        count, width = self._sizes(inputs, outputs)
        columns = self._columns(inputs, count, posteriors)
        numbers = width * self._numbers if columns is None else width**2
        for part in chunks(count, numbers, self.chunk_size):
            if columns is None:
                rows = jacobians(self.forward, self._parameters, sliced(inputs, part))
                yield part, [covariance_of_rows(posterior, rows) for posterior in posteriors]
            else:
                (layer,) = self.layouts
                blocks = [posterior.blocks[layer] for posterior in posteriors]
                yield part, [last_linear.covariance(block, columns[part]) for block in blocks]

    def variances(
        self, inputs: Any, outputs: Tensor, posteriors: Sequence[DampedCurvature]
    ) -> Chunks:
        """The diagonals of the same, (n, ...), without the rest of it.

        Jacobians of a sample are taken for some outputs at a time where they take too much memory.
        """
        count, width = self._sizes(inputs, outputs)
        columns = self._columns(inputs, count, posteriors)
        numbers = width * self._numbers if columns is None else 2 * width + columns[0].numel()
        for part in chunks(count, numbers, self.chunk_size):
            if columns is None:
                found = self._variances_of(sliced(inputs, part), width, posteriors)
            else:
                (layer,) = self.layouts
                blocks = [posterior.blocks[layer] for posterior in posteriors]
                found = [last_linear.variance(block, columns[part]) for block in blocks]
            yield part, [values.reshape(outputs[part].shape) for values in found]

    def _variances_of(
        self, inputs: Any, width: int, posteriors: Sequence[DampedCurvature]
    ) -> list[Tensor]:
        found: list[list[Tensor]] = [[] for _ in posteriors]
        for some in chunks(width, count_samples(inputs) * self._numbers, None):
            rows = jacobians(self.forward, self._parameters, inputs, some)
            for parts, posterior in zip(found, posteriors, strict=True):
                parts.append(posterior.inverse_quadratic_form(rows))
        return [torch.cat(parts, 1) for parts in found]

    def _sizes(self, inputs: Any, outputs: Tensor) -> tuple[int, int]:
        """How many samples there are, and how many outputs each has; for samples that are apart."""
        self.forward.check_separate(inputs)
        return count_samples(inputs), outputs[0].numel()

    def _columns(
        self, inputs: Any, count: int, posteriors: Sequence[DampedCurvature]
    ) -> Tensor | None:
        """For the closed form, where the posteriors are of a last linear layer alone."""
        if not all(map(last_linear.factored, (b for p in posteriors for b in p.blocks.values()))):
            return None
        return last_linear.inputs_of_last(self.forward, self.layouts, inputs, count)

    @property
    def _parameters(self) -> dict[str, Tensor]:
        return self.forward.parameters(covered(self.layouts))

    @property
    def _numbers(self) -> int:
        return sum(value.numel() for value in self._parameters.values())


def covariance_of_rows(posterior: DampedCurvature, rows: Mapping[str, Tensor]) -> Tensor:
    """`J B^-1 J^T`, (N, K, K), from Jacobians name -> (N, K, *shape)."""
    solved = posterior.solve(rows)
    parts = [rows[name].flatten(2) @ solved[name].flatten(2).mT for name in rows]
    covariance = torch.stack(parts).sum(0)
    return (covariance + covariance.mT) / 2
