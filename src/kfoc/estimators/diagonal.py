"""The exact diagonal of F."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kfoc.blocks import DiagonalBlock
from kfoc.errors import Footprint
from kfoc.estimators.base import Estimator, State
from kfoc.estimators.tokens import add_squares
from kfoc.plans.base import CHUNK
from kfoc.samples.base import LayerSamples, gradient_chunks
from kfoc.samples.linear import Samples
from kfoc.samples.one_hot import OneHot


@dataclass
class _State(State):
    squares: Tensor  # (o, i), summed over the samples

    def add(self, samples: LayerSamples, alone: bool) -> None:
        if isinstance(samples, Samples) and isinstance(samples.inputs, OneHot):
            add_squares(self.squares, samples)
            return
        if samples.num_positions == 1 and isinstance(samples, Samples):
            # X = g a^T squares to g^2 (a^2)^T: one product, and no per-sample gradient.
            rescaled, scale = samples.rescaled()  # g^2 and a^2 may leave the range that X^2 is in
            if scale <= torch.finfo(self.squares.dtype).max:
                inputs = rescaled.inputs.columns(0, samples.num_samples)[:, :, 0].mT.square()
                grads = rescaled.grads[:, :, 0].square().sum(0)
                self.squares.addmm_(grads.mT, inputs, alpha=scale)
                return
        for gradients in gradient_chunks(samples, CHUNK):
            self.squares += gradients.square().sum((0, 1))

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
