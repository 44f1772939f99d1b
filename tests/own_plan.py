"""A plan of one's own, in a file of its own: docs/design.md shows it."""

from __future__ import annotations

import torch
from torch import Tensor

from kfoc.nearest.contraction import Side
from kfoc.plans.base import Plan
from kfoc.plans.cost import Cost, Size
from kfoc.samples.linear import Samples


class OneByOne(Plan):
    """The half steps go through the per-sample gradients, which are formed one after the other."""

    plan = "one by one"

    def __init__(self, samples: Samples, memory_limit: int) -> None:
        inputs = samples.inputs.rows(0, samples.num_samples)
        pairs = [
            (g, a) for direction in samples.grads for g, a in zip(direction, inputs, strict=True)
        ]
        self.gradients = [g.mT @ a for g, a in pairs]

    @staticmethod
    def fits(z: Size) -> bool:
        return z.N == 1  # which spares the others' preparations

    @staticmethod
    def cost(z: Size) -> Cost:
        step = z.S * z.N * z.o * z.i * (z.o + z.i)
        return Cost(z.S * z.N * z.T * z.o * z.i, step, 0, z.S * z.N * z.o * z.i)

    def start(self) -> Tensor:
        size = self.gradients[0].shape[1]
        return self.advance(torch.eye(size) / size**0.5, "right")

    def apply(self, matrix: Tensor, side: Side) -> Tensor:
        return self.advance(matrix, side)

    def advance(self, representation: Tensor, side: Side) -> Tensor:
        if side == "left":
            return sum((x.mT @ representation @ x for x in self.gradients), torch.zeros(()))
        return sum((x @ representation @ x.mT for x in self.gradients), torch.zeros(()))

    def factor(self, representation: Tensor, side: Side) -> Tensor:
        return (representation + representation.mT) / 2

    def inner(self, first: Tensor, second: Tensor, side: Side) -> Tensor:
        return (first * second).sum()

    def squared_norm(self) -> float:
        rows = torch.stack([x.flatten() for x in self.gradients])
        return (rows @ rows.mT).square().sum().item()
