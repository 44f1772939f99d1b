"""What a plan costs for a layer: multiply-adds and memory, counted from the layer's shape."""

from __future__ import annotations

from dataclasses import dataclass

from kfoc.linalg.products import share
from kfoc.samples.linear import Samples

# What a solve takes as a rule, beyond its start; the measured counts are 3 to 5 half steps.
HALF_STEPS = 4

# What moving a number to and from memory costs, in multiply-adds of a matrix product.
TRAFFIC = 16


@dataclass(frozen=True)
class Size:
    """The numbers that a cost depends on: directions, samples, positions, inputs, outputs."""

    S: int
    N: int
    T: int
    i: int
    o: int

    @staticmethod
    def of(samples: Samples) -> Size:
        o, i = samples.shape
        return Size(samples.num_directions, samples.num_samples, samples.num_positions, i, o)


@dataclass(frozen=True)
class Cost:
    """Multiply-adds of a plan, and the numbers that it keeps.

    Attributes:
        setup: once, before any step (unfolding and forming products).
        half_step: of a half step, the mean of the two directions.
        factors: to form both factors, once, from what is iterated on.
        memory: numbers kept from the set-up to the end, beyond inputs and gradients.
    """

    setup: float
    half_step: float
    factors: float
    memory: float

    def total(self, half_steps: int = HALF_STEPS) -> float:
        return self.setup + half_steps * self.half_step + self.factors

    def expected(self) -> float:
        """Multiply-adds of a usual solve, and what is kept, read once a half step, in the same
        currency."""
        return self.total() + TRAFFIC * self.memory * (HALF_STEPS + 2)


def factors(z: Size) -> float:
    """Weighted Gram matrices of inputs and gradients, as K-FAC's two products."""
    return z.N * z.T * (share(z.i) * z.i**2 + z.S * share(z.o) * z.o**2)


def positioned(z: Size) -> float:
    """Multiply-adds of forming both factors from W and V."""
    return one_side(z, z.i) + z.S * one_side(z, z.o)


def one_side(z: Size, size: int) -> float:
    """Multiply-adds of forming a factor of this size from W or V, per direction."""
    return z.N * z.T * (z.T * size + share(size) * size**2)
