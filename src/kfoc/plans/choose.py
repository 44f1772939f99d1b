"""Which plan is cheapest for a layer, and the contraction by it."""

from __future__ import annotations

from kfoc.nearest.contraction import Contraction
from kfoc.plans.base import Plan
from kfoc.plans.cost import Size
from kfoc.plans.explicit import Dense, Gradients
from kfoc.plans.positions import PositionGram, Positions
from kfoc.plans.single import Gram, Primal
from kfoc.plans.sketch_cost import reduced_rank, sketch_cost
from kfoc.plans.tokens import TiedTokens, TokenPairs
from kfoc.samples.linear import Samples
from kfoc.samples.tied import Tied

# A plan of one's own goes in here.
PLANS: dict[str, type[Plan]] = {
    each.plan: each for each in (Gram, Primal, PositionGram, Positions, Gradients, Dense)
}


def choose(size: Size, memory_limit: int, element_size: int) -> str:
    """The plan with the fewest multiply-adds that keeps at most `memory_limit` bytes.

    Where none fits, "primal" or "gradients", which can do with none of their own.
    """
    if size.T == 0:
        return "gradients"
    costs = {name: plan.cost(size) for name, plan in PLANS.items() if plan.fits(size)}
    fitting = {n: c for n, c in costs.items() if c.memory * element_size <= memory_limit}
    if not fitting:
        return "primal" if size.T == 1 else "gradients"

    def multiply_adds(name: str) -> float:
        # Some solves go on beyond the sketch: by the plan whose half steps cost least.
        return min(fitting[name].expected(), sketch_cost(size, name) + fitting[name].half_step)

    return min(fitting, key=multiply_adds)


def sketch_rank(size: Size, name: str, memory_limit: int, element_size: int) -> int:
    """Directions that a sketch should reduce the samples to; 0 where it does not pay or fit."""
    rank, count = reduced_rank(size), size.S * size.N
    cost = PLANS[name].cost(size)
    # The reduced samples, as they come about: before and after a step of subspace iteration.
    held: float = 2 * rank * (size.N + count)
    if size.T > 1:
        held = 3 * rank * count * (size.i + size.o)
    if name == "gradients":  # they would have to be formed anew at every step
        held += cost.memory
    if held * element_size > memory_limit or sketch_cost(size, name) >= cost.expected():
        return 0
    return rank


def sums_densely(size: Size, budget: int) -> bool:
    """Whether a stream of batches is best summed as F itself: small, and as cheap as a half step
    or two of every batch. Then the whole stream gets its optimum, in one pass.
    """
    parameters = size.o * size.i
    few = parameters**2 <= budget and parameters <= 16 * (size.o + size.i)
    return size.T > 1 and few


def contract(
    samples: Samples | Tied, memory_limit: int = 2**30, plan: str | None = None
) -> Contraction:
    """The contraction of `samples` by the named plan, or by the cheapest that fits the memory.

    Tokens of a large vocabulary have a plan of their own, and no other.
    """
    if isinstance(samples, Tied):
        return TiedTokens(samples)
    if samples.diagonal:
        return TokenPairs(samples)
    name = plan or choose(Size.of(samples), memory_limit, samples.grads.element_size())
    return PLANS[name](samples, memory_limit)
