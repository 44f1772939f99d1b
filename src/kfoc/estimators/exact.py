"""The power iteration over the whole data set, one half step per pass."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from kfoc.estimators.aggregation import last_change
from kfoc.estimators.online import Online
from kfoc.estimators.options import Options
from kfoc.estimators.pooling import Pooling, Sum
from kfoc.linalg.products import mirrored
from kfoc.linalg.scaling import balance, norm_of
from kfoc.nearest.contraction import Side, opposite
from kfoc.nearest.power import settled
from kfoc.samples.linear import Samples


class Exact(Online):
    """After a pass of `Online`, the power iteration, one half step per pass."""

    side: Side | None
    fixed: Tensor
    image: Tensor
    sigmas: list[float]

    def __init__(self, config: Options, samples: Samples) -> None:
        super().__init__(config, samples)
        self.side = None  # of the factor that is held fixed in this pass
        self.fixed = self.image = self.like
        self.sigmas = []

    def absorb(self, samples: Samples) -> None:
        if self.side is None:
            super().absorb(samples)
            return
        rescaled, scale = samples.rescaled()
        contraction = self.config.contraction(rescaled)
        step = contraction.apply(self.fixed, self.side)
        contraction.accumulate(self.image, step, opposite(self.side), scale / (self.unit or 1.0))

    def pooled(self) -> Pooling[None]:
        if self.side is None:
            yield from super().pooled()
        else:
            self.flush()
            yield [Sum([mirrored(self.image)])]

    def next_pass(self) -> bool:
        if self.side is None:
            left, _ = self.result(self.weight or 1.0)
            norm = norm_of(left)
            if self.head is None or not norm:  # all data was at hand at once, or is zero
                return True
            if self.config.passes == 1:  # the estimate of that pass is all there will be
                self.report = replace(self.report, converged=False)
                return True
            self.head = None
            self._fix("left", left / norm, self.like.new_zeros(self.right_shape))
            return False
        self.flush()
        mirrored(self.image)
        self.sigmas.append(norm_of(self.image))
        precision = 4 * torch.finfo(self.image.dtype).eps
        converged = settled(self.sigmas, self.config.rtol, precision)
        self.report = replace(self.report, steps=len(self.sigmas), converged=converged)
        if not converged and len(self.sigmas) + 1 < self.config.passes:
            self.image /= self.sigmas[-1] or 1.0
            self._fix(opposite(self.side), self.image, self.fixed.zero_())
            return False
        return True

    def _fix(self, side: Side, fixed: Tensor, image: Tensor) -> None:
        self.side, self.fixed, self.image = side, fixed, image

    def change(self) -> float | None:
        return last_change(self.sigmas)

    def result(self, num_samples: float) -> tuple[Tensor, Tensor]:
        if not self.sigmas:
            return super().result(num_samples)
        left, right = self.fixed, self.image
        if self.side == "right":
            left, right = right, left
        return balance(left, right, self.sigmas[-1] * self.unit / num_samples)
