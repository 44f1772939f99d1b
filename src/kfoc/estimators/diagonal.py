"""The exact diagonal of F."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kfoc.blocks import DiagonalBlock
from kfoc.errors import Footprint
from kfoc.estimators.base import Estimator
from kfoc.estimators.pooling import Pooling, Sum
from kfoc.estimators.tokens import add_squares
from kfoc.plans.base import CHUNK
from kfoc.samples.base import LayerSamples, gradient_chunks
from kfoc.samples.linear import Samples
from kfoc.samples.one_hot import OneHot


@dataclass(frozen=True)
class Diagonal(Estimator):
    """The diagonal of every block, exactly: the mean of squared per-sample gradients."""

    def init(self, layer: str, samples: LayerSamples) -> Tensor:
        return samples.grads.new_zeros(samples.shape)

    def update(self, state: Tensor, samples: LayerSamples, *, alone: bool) -> Tensor:
        if isinstance(samples, Samples) and isinstance(samples.inputs, OneHot):
            add_squares(state, samples)
            return state
        if samples.num_positions == 1 and isinstance(samples, Samples):
            # X = g a^T squares to g^2 (a^2)^T: one product, and no per-sample gradient.
            rescaled, scale = samples.rescaled()  # g^2 and a^2 may leave the range that X^2 is in
            if scale <= torch.finfo(state.dtype).max:
                inputs = rescaled.inputs.columns(0, samples.num_samples)[:, :, 0].mT.square()
                grads = rescaled.grads[:, :, 0].square().sum(0)
                return state.addmm_(grads.mT, inputs, alpha=scale)
        for gradients in gradient_chunks(samples, CHUNK):
            state += gradients.square().sum((0, 1))
        return state

    def footprint(self, samples: LayerSamples) -> Footprint:
        o, i = samples.shape
        size = o * i * samples.grads.element_size()
        return Footprint(size, size)

    def decayed(self, state: Tensor, factor: float) -> Tensor:
        return state.mul_(factor)

    def pooled(self, state: Tensor) -> Pooling[Tensor]:
        yield [Sum([state])]
        return state

    def finish(self, state: Tensor, num_samples: float) -> DiagonalBlock:
        return DiagonalBlock(state / num_samples)
