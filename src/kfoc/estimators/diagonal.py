"""The exact diagonal of F."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kfoc.blocks import DiagonalBlock
from kfoc.errors import Footprint
from kfoc.estimators import tokens
from kfoc.estimators.base import Estimator, State
from kfoc.plans.base import CHUNK
from kfoc.samples.base import LayerSamples, gradient_chunks
from kfoc.samples.linear import Samples
from kfoc.samples.one_hot import OneHot


@dataclass
class _State(State):
    squares: Tensor  # (o, i), summed over the samples

    def add(self, samples: LayerSamples, alone: bool) -> None:
        if isinstance(samples, Samples) and isinstance(samples.inputs, OneHot):
            tokens.add_squares(self.squares, samples)
            return
        add_squares(self.squares, samples)

    def totals(self) -> list[Tensor]:
        return [self.squares]

    def block(self, num_samples: float) -> DiagonalBlock:
        return DiagonalBlock(self.squares / num_samples)


@dataclass(frozen=True)
class Diagonal(Estimator):
    """The diagonal of every block, exactly: the mean of squared per-sample gradients."""

    def begin(self, layer: str, samples: LayerSamples) -> State:
        return _State(samples.grads.new_zeros(samples.shape))

    def footprint(self, samples: LayerSamples) -> Footprint:
        o, i = samples.shape
        size = o * i * samples.grads.element_size()
        return Footprint(size, size)


def add_squares(
    total: Tensor, samples: LayerSamples, basis: tuple[Tensor, Tensor] | None = None
) -> None:
    """`total += sum_{s,n} (U^T X V)^2`, (o, i), entry by entry; U and V are the basis, if any."""
    if samples.num_positions == 1 and isinstance(samples, Samples):
        # X = g a^T: the square of U^T g (V^T a)^T is an outer product too, and X is not formed.
        rescaled, scale = samples.rescaled()  # their squares may leave the range that X^2 is in
        if scale <= torch.finfo(total.dtype).max:
            inputs = rescaled.inputs.columns(0, samples.num_samples)[:, :, 0].mT
            grads = rescaled.grads[:, :, 0]
            if basis:
                inputs, grads = inputs @ basis[1], grads @ basis[0]
            total.addmm_(grads.square().sum(0).mT, inputs.square(), alpha=scale)
            return
    for gradients in gradient_chunks(samples, CHUNK):
        if basis:
            gradients = basis[0].mT @ gradients @ basis[1]
        total += gradients.square().sum((0, 1))
