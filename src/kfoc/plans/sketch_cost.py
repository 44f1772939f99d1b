"""What a solve from a sketch costs, by the plan that takes its half steps over all samples."""

from __future__ import annotations

import math

from kfoc.linalg.products import share
from kfoc.plans.cost import Size, factors, one_side, positioned
from kfoc.plans.positions import PositionGram
from kfoc.plans.single import Primal

# What reducing samples and solving for them costs beside multiply-adds, in these.
SKETCHING = 2**28

# Plans that a solve from a sketch can go by.
SKETCHABLE = ("primal", "position_gram", "positions", "gradients")

# Rows of the sketch of a factor, and directions that a third half step is checked along.
ROWS = 64
PROBES = 8


def reduced_rank(z: Size) -> int:
    """Directions that a sketch reduces the samples to (`kfoc.plans.sketch`); 0: too few for it."""
    if z.T == 1:
        return 64 if max(z.i, z.o) > 192 else 0
    # The more samples, the better do errors of theirs cancel.
    rank = min(max(8, 256 // (z.S * z.N)), 32, min(z.T, z.i, z.o) // 4)
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
        return setup + Primal.cost(reduced).total(8) + rows + 2 * factors(z) + SKETCHING
    reduced = Size(1, count, rank, z.i, z.o)
    solve = PositionGram.cost(reduced).total(8) + SKETCHING
    probes = PROBES * larger**2 * count
    if name == "gradients":
        # Formed; reduced; and two half steps, of which the first is by a few rows.
        setup = count * z.o * z.i * (z.T + 2 * rank + ROWS + PROBES)
        step = min(z.i, z.o) + share(larger) * larger
        return setup + solve + probes + count * z.o * z.i * step
    setup = count * z.T * (z.i + z.o) * 2 * rank
    first = count * z.T * (larger * (ROWS + PROBES) + z.T * ROWS)
    second = z.S * one_side(z, z.o) if z.o <= z.i else one_side(z, z.i)
    return setup + solve + probes + first + second + positioned(z)
