"""Layers whose rows have nothing in common, as those of depthwise convolutions: F, row by row."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from kfoc.blocks import GroupedBlock, KroneckerBlock, Report
from kfoc.estimators.base import State
from kfoc.estimators.pooling import Pooling, Sum
from kfoc.estimators.scaled import Scaled
from kfoc.linalg.scaling import balanced
from kfoc.plans.base import CHUNK
from kfoc.samples.base import gradient_chunks
from kfoc.samples.grouped import Depthwise


@dataclass
class Rows(Scaled, State):
    """Each row's F, which is the optimum: a row's `left` is 1 x 1."""

    total: Tensor  # (o, i, i)
    unit: float = 0.0

    def add(self, samples: Depthwise, alone: bool) -> None:
        """Add a batch's `sum X_g^T X_g` for every row g, in the larger of the scales."""
        rescaled, scale = samples.rescaled()
        if not scale:
            return
        share = self.room(scale)
        o, i = samples.shape
        for gradients in gradient_chunks(rescaled, CHUNK):
            rows = gradients.permute(2, 0, 1, 3).reshape(o, -1, i)
            self.total.baddbmm_(rows.mT, rows, alpha=share)

    def scale(self, factor: float) -> None:
        self.total.mul_(factor)

    def totals(self) -> list[Tensor]:
        return [self.total]

    def pooled(self) -> Pooling[None]:
        yield from self.in_common_units()
        yield [Sum([self.total])]

    def block(self, num_samples: float) -> GroupedBlock:
        total, scale = (self.total + self.total.mT) / 2, self.unit / num_samples
        one = total.new_ones(1, 1)
        report = Report(plan="rows")
        # Norms are those of the total, near one: squares of F's own numbers may leave their range.
        blocks = tuple(
            KroneckerBlock(*balanced(one, each, each.norm().item() * scale), report=report)
            for each in total
        )
        return GroupedBlock(blocks, report=report)
