"""The cost model against counted multiply-adds, and the choices that it makes."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import kfoc
from kfoc.linalg.products import add_symmetric, blocks, gram, halves, mirrored, share, times_half
from kfoc.plans.choose import PLANS, choose
from kfoc.plans.cost import Size
from kfoc.plans.sketch import fit_from_sketch
from kfoc.plans.sketch_cost import SKETCHING, reduced_rank, sketch_cost
from kfoc.samples.inputs import Rows
from kfoc.samples.linear import Samples

SIZES = {
    "plain": Size(S=1, N=60, T=1, i=50, o=30),
    "wide": Size(S=1, N=50, T=1, i=450, o=390),
    "directions": Size(S=3, N=20, T=1, i=40, o=30),
    "positions": Size(S=1, N=6, T=20, i=30, o=20),
    "positions and directions": Size(S=2, N=5, T=12, i=30, o=20),
    "many positions": Size(S=1, N=5, T=200, i=30, o=20),
    "wide positions": Size(S=1, N=4, T=10, i=420, o=20),
}


def samples(size: Size) -> Samples:
    inputs = torch.randn(size.N, size.T, size.i)
    return Samples(Rows(inputs), torch.randn(size.S, size.N, size.T, size.o))


def counted(function) -> float:
    aten = torch.ops.aten
    # torch's counter knows neither the in-place products nor those with vectors.
    more = {
        aten.addmm_: lambda total, a, b, **_: 2 * a[0] * a[1] * b[1],
        aten.baddbmm_: lambda total, a, b, **_: 2 * a[0] * a[1] * a[2] * b[2],
        aten.mv: lambda a, b, **_: 2 * a[0] * a[1],
    }
    with FlopCounterMode(display=False, custom_mapping=more) as counter:
        function()
    return counter.get_total_flops() / 2


CASES = [
    (name, plan)
    for name, size in SIZES.items()
    for plan in PLANS
    if (size.T == 1 or not PLANS[plan].single)
    and (plan != "dense" or size.i * size.o < 2000)
    and (plan not in ("positions", "position_gram") or size.T > 1)
]


@pytest.mark.parametrize(("name", "plan"), CASES)
def test_costs_are_the_counted_multiply_adds(name: str, plan: str) -> None:
    size = SIZES[name]
    cost = PLANS[plan].cost(size)
    half_steps = 4

    def solve(steps: int) -> float:
        def run() -> None:
            contraction = PLANS[plan](samples(size), 2**30)
            current, side = contraction.start(), "left"
            for _ in range(steps):
                current, side = (
                    contraction.advance(current, side),
                    {"left": "right", "right": "left"}[side],
                )
            other = contraction.advance(current, side)
            contraction.factor(current, side)
            contraction.factor(other, {"left": "right", "right": "left"}[side])

        return counted(run)

    first, second = solve(1), solve(1 + half_steps)
    # Elementwise work is counted by neither side.
    assert (second - first) / half_steps == pytest.approx(cost.half_step, rel=0.1)
    expected = cost.setup + 2 * cost.half_step + cost.factors
    assert first == pytest.approx(expected, rel=0.1)


@pytest.mark.parametrize(
    ("size", "plan"),
    [
        (Size(S=1, N=900, T=1, i=500, o=400), "primal"),
        (Size(S=1, N=6, T=60, i=200, o=150), "position_gram"),
        (Size(S=2, N=5, T=60, i=150, o=200), "positions"),
        (Size(S=1, N=6, T=200, i=90, o=60), "gradients"),
    ],
)
def test_cost_of_a_sketch_is_near_the_counted_multiply_adds(size: Size, plan: str) -> None:
    """Near: how many half steps the small problem takes depends on the samples."""
    falling = torch.arange(1.0, size.i + 1) ** -2.0, torch.arange(1.0, size.o + 1) ** -2.0
    drawn = samples(size)
    drawn = Samples(Rows(drawn.inputs.tensor * falling[0]), drawn.grads * falling[1])
    contraction = PLANS[plan](drawn, 2**30)

    def solve() -> None:
        shape, rank = (size.o, size.i), reduced_rank(size)
        fit = fit_from_sketch(
            contraction, shape, rank, rtol=1e-6, max_steps=100, certify=False, scale=1.0
        )
        assert fit.steps == 2

    expected = sketch_cost(size, plan) - SKETCHING
    assert 0.6 < counted(solve) / expected < 1.4


@pytest.mark.parametrize(
    ("size", "plan"),
    [
        (Size(1, 128, 1, 785, 1024), "gram"),
        (Size(1, 60_000, 1, 65, 10), "primal"),
        (Size(1, 64, 256, 289, 64), "gradients"),
        (Size(1, 32, 1024, 577, 64), "gradients"),
        (Size(1, 32, 16, 4609, 512), "position_gram"),
        (Size(1, 8, 128, 257, 768), "position_gram"),
        (Size(1, 8, 128, 769, 3072), "position_gram"),
        (Size(1, 5000, 20, 26, 6), "dense"),
    ],
)
def test_choices_of_the_design(size: Size, plan: str) -> None:
    assert choose(size, 2**30, 4) == plan


def test_memory_limit_is_kept() -> None:
    size = Size(1, 128, 1, 785, 1024)
    assert choose(size, 1000, 4) == "primal"
    for plan in ("position_gram", "positions", "gradients", "dense"):
        size = Size(1, 8, 16, 30, 20)
        limit = int(PLANS[plan].cost(size).memory) * 4 - 1
        chosen = choose(size, limit, 4)
        assert chosen == "gradients" or PLANS[chosen].cost(size).memory * 4 <= limit


def test_chosen_plan_is_on_the_report() -> None:
    model, x = torch.nn.Linear(60, 40), torch.randn(9, 60)
    assert kfoc.fit(model, [(x, None)], "gaussian")[""].report.plan == "gram"


@pytest.mark.parametrize("size", [1, 191, 384, 500, 900])
def test_symmetric_products(size: int) -> None:
    a, b = torch.randn(7, size), torch.randn(size, size)
    symmetric = b + b.mT
    weights = torch.randn(7, 7)
    first, second = a, (weights + weights.mT) @ a
    total = torch.zeros(size, size)
    add_symmetric(total, first, second, alpha=0.5)
    add_symmetric(total, first, second, alpha=0.5)
    found = mirrored(total)
    torch.testing.assert_close(found, first.mT @ second)
    assert torch.equal(found, found.mT)
    product = times_half(a, symmetric.triu(), halves(symmetric)) @ a.mT
    torch.testing.assert_close(product + product.mT, a @ symmetric @ a.mT)
    torch.testing.assert_close(gram(a), a.mT @ a)
    assert share(size) <= 1.0
    assert blocks(size)[-1][1] == size
