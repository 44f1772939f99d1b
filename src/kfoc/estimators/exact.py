"""The power iteration over the whole data set, one half step per pass."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from kfoc.estimators.aggregation import iterated, last_change
from kfoc.estimators.online import Online
from kfoc.estimators.options import Options
from kfoc.estimators.pooling import Pooling, Sum
from kfoc.linalg.products import mirrored
from kfoc.linalg.scaling import balance, norm_of
from kfoc.nearest.contraction import opposite
from kfoc.nearest.power import PowerIteration, Tolerance
from kfoc.samples.linear import Samples


class Exact(Online):
    """After a pass of `Online`, the power iteration, one half step per pass."""

    several_passes = True
    counts_batches = False

    power: PowerIteration | None
    image: Tensor

    def __init__(self, config: Options, samples: Samples) -> None:
        super().__init__(config, samples)
        self.power = None
        self.image = self.like  # of the factor that it asks for

    def absorb(self, samples: Samples) -> None:
        if self.power is None:
            super().absorb(samples)
            return
        rescaled, scale = samples.rescaled()
        contraction = self.config.contraction(rescaled)
        factor, side = self.power.ask()
        share = scale / (self.unit or 1.0) / self.power.norm
        contraction.accumulate(self.image, contraction.apply(factor, side), opposite(side), share)

    def pooled(self) -> Pooling[None]:
        if self.power is None:
            yield from super().pooled()
        else:
            self.flush()
            yield [Sum([mirrored(self.image)])]

    def next_pass(self) -> bool:
        if self.power is None:
            left, _ = self.result(self.weight or 1.0)
            norm = norm_of(left)
            if self.head is None or not norm:  # all data was at hand at once, or is zero
                return True
            if self.config.passes == 1:  # the estimate of that pass is all there will be
                self.report = replace(self.report, converged=False)
                return True
            self.head = None
            self.power = PowerIteration(
                "left", left / norm, Tolerance(self.config.rtol), self.config.passes - 1
            )
            self.image = self.like.new_zeros(self.right_shape)
            return False
        self.flush()
        factor, _ = self.power.ask()
        self.power.tell(mirrored(self.image), norm_of(self.image))
        self.report = replace(iterated(self.power, self.report.plan), head=self.report.head)
        if not self.power.done:
            self.image = factor.zero_()
        return self.power.done

    def change(self) -> float | None:
        return last_change(self.power.sigmas if self.power else [])

    def result(self, num_samples: float) -> tuple[Tensor, Tensor]:
        if self.power is None or not self.power.sigmas:
            return super().result(num_samples)
        left, right = self.power.factor, self.image
        if self.power.side == "right":
            left, right = right, left
        return balance(left, right, self.power.sigmas[-1] * self.unit / num_samples)
