"""What every plan costs for a layer: multiply-adds and memory, counted from its shape."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from kfoc.linalg.products import share
from kfoc.plans.positions import by_factor, by_products, of_pairs, through_products
from kfoc.samples.linear import Samples

# What a solve takes as a rule, beyond its start; the measured counts are 3 to 5 half steps.
HALF_STEPS = 4

# What reducing samples and solving for them costs beside multiply-adds, in these.
SKETCHING = 2**28

# Plans that a solve from a sketch can go by.
SKETCHABLE = ("primal", "position_gram", "positions", "gradients")

# Rows of the sketch of a factor, and directions that a third half step is checked along.
ROWS = 64
PROBES = 8

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


def _gram(z: Size) -> Cost:
    left = share(z.N) if z.S == 1 else 1.0
    setup = z.N**2 * (share(z.N) * z.i + left * z.S**2 * z.o)
    return Cost(setup, z.N**2, _factors(z), 2 * z.N**2)


def _factors(z: Size) -> float:
    """Weighted Gram matrices of inputs and gradients, as K-FAC's two products."""
    return z.N * z.T * (share(z.i) * z.i**2 + z.S * share(z.o) * z.o**2)


def _primal(z: Size) -> Cost:
    # A half step forms one factor and applies it: all four products in two half steps.
    return Cost(0.0, _factors(z), _factors(z), 0)


def _positioned(z: Size) -> float:
    """Multiply-adds of forming both factors from W and V."""
    return _one_side(z, z.i) + z.S * _one_side(z, z.o)


def _one_side(z: Size, size: int) -> float:
    """Multiply-adds of forming a factor of this size from W or V, per direction."""
    return z.N * z.T * (z.T * size + share(size) * size**2)


def _positions(z: Size) -> Cost:
    setup = z.N * z.T**2 * z.i
    return Cost(setup, _positioned(z), _positioned(z), z.N * z.T * (z.i + 2 * z.T))


def _position_gram(z: Size) -> Cost:
    setup: float = z.N * z.T**2 * z.i
    steps, memory = 0.0, z.N * z.T * (z.i + 2 * z.T)
    for directions, size in ((1, z.i), (z.S, z.o)):
        if through_products(directions, z.N, z.T, size):
            setup += of_pairs(directions * z.N, z.T, size)
            memory += (directions * z.N * z.T) ** 2
            steps += by_products(directions, z.N, z.T)
        else:
            steps += by_factor(directions, z.N, z.T, size)
    return Cost(setup, steps / 2, _positioned(z), memory)


def _gradients(z: Size) -> Cost:
    count = z.S * z.N
    setup = count * z.o * z.i * (z.T + z.o)
    half_step = count * (share(z.i) * z.o * z.i**2 + z.o**2 * z.i)
    return Cost(setup, half_step, 0.0, count * z.o * z.i)


def _dense(z: Size) -> Cost:
    size = z.o * z.i
    setup = z.S * z.N * size * (z.T + share(size) * size)
    return Cost(setup, size**2, 0.0, 2 * size**2)


def reduced_rank(z: Size) -> int:
    """Directions that a sketch reduces the samples to (`kfoc.plans.sketch`); 0: too few for it."""
    if z.T == 1:
        return 96 if max(z.i, z.o) > 192 else 0
    # The more samples, the better do errors of theirs cancel.
    rank = min(max(8, 512 // (z.S * z.N)), 32, min(z.T, z.i, z.o) // 4)
    return rank if rank >= 8 else 0


def sketch_cost(z: Size, name: str) -> float:
    """Multiply-adds of a solve by the named plan from a sketch, where that suffices."""
    rank, count, larger = reduced_rank(z), z.S * z.N, max(z.i, z.o)
    if not rank or name not in SKETCHABLE:
        return math.inf
    if z.T == 1:
        projected = [min(size, rank) if size > 2 * rank else size for size in (z.i, z.o)]
        reduced = Size(z.S, z.N, 1, *projected)
        setup = (3 * rank + 1) * z.N * (z.i + z.S * z.o)
        rows = z.N * rank * larger * (z.S if larger == z.o else 1)
        return setup + _primal(reduced).total(8) + rows + 2 * _factors(z) + SKETCHING
    reduced = Size(1, count, rank, z.i, z.o)
    solve = _position_gram(reduced).total(8) + SKETCHING
    probes = PROBES * larger**2 * count
    if name == "gradients":
        # Formed; reduced; and two half steps, of which the first is by a few rows.
        setup = count * z.o * z.i * (z.T + 6 * rank + ROWS + PROBES)
        step = min(z.i, z.o) + share(larger) * larger
        return setup + solve + probes + count * z.o * z.i * step
    setup = z.N * z.T**2 * z.i + count * z.T * (z.i + z.o) * 6 * rank
    first = count * z.T * larger * (ROWS + PROBES)
    second = z.S * _one_side(z, z.o) if z.o <= z.i else _one_side(z, z.i)
    return setup + solve + probes + first + second + _positioned(z)


COSTS: dict[str, Callable[[Size], Cost]] = {
    "gram": _gram,
    "primal": _primal,
    "position_gram": _position_gram,
    "positions": _positions,
    "gradients": _gradients,
    "dense": _dense,
}
