"""The start from a sketch, against the rearranged Fisher and its SVD."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import kfoc
from kfoc.nearest.accelerated import fit_contraction
from kfoc.nearest.contraction import Side, opposite
from kfoc.nearest.power import EXCESS, Tolerance
from kfoc.plans import single
from kfoc.plans.base import Formed
from kfoc.plans.choose import PLANS, contract, sketch_rank
from kfoc.plans.cost import Size
from kfoc.plans.explicit import Gradients
from kfoc.plans.positions import Positions
from kfoc.plans.single import Primal
from kfoc.plans.sketch import CLOSEST, Sketchable, fit_from_sketch, formed, sketched
from kfoc.samples.inputs import Rows
from kfoc.samples.linear import Samples
from oracle import assert_psd_and_symmetric, rearranged

NAMES = ["primal", "positions", "position_gram", "gradients"]
SHAPE = 20, 24  # (o, i)


def falling(size: int, generator: torch.Generator, power: float) -> Tensor:
    """A mixing of directions whose sizes fall, as those of inputs and gradients do."""
    orthogonal = torch.linalg.qr(torch.randn(size, size, generator=generator))[0]
    return torch.arange(1.0, size + 1)[:, None] ** -power * orthogonal


def samples_of(
    plan: str, seed: int, *, power: float = 1.0, directions: int = 1, constant: float | None = None
) -> Samples:
    generator = torch.Generator().manual_seed(seed)
    o, i = SHAPE
    N, T = (70, 1) if plan == "primal" else (9, 16)
    width = i - (constant is not None)
    inputs = torch.randn(N, T, width, generator=generator) + 0.3
    grads = torch.randn(directions, N, T, o, generator=generator)
    inputs = inputs @ falling(width, generator, power)
    return Samples(Rows(inputs, constant), grads @ falling(o, generator, power))


def fisher_sum(samples: Samples) -> Tensor:
    inputs = samples.inputs.rows(0, samples.num_samples)
    x = torch.einsum("snto,nti->snoi", samples.grads, inputs).flatten(2).flatten(0, 1)
    return x.mT @ x


def contraction_of(samples: Samples, plan: str) -> Sketchable:
    contraction = contract(samples, plan=plan)
    assert isinstance(contraction, Primal | Positions | Gradients)
    return contraction


@pytest.mark.parametrize("plan", NAMES)
@pytest.mark.parametrize("constant", [None, 0.5])
@pytest.mark.parametrize("directions", [1, 2])
@pytest.mark.parametrize("power", [0.0, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("rank", [1, 4, 8])
def test_is_the_optimum_however_poor_the_sketch(
    plan: str, constant: float | None, directions: int, power: float, rank: int
) -> None:
    for seed in range(3):
        samples = samples_of(plan, seed, power=power, directions=directions, constant=constant)
        contraction = contraction_of(samples, plan)
        fit = fit_from_sketch(
            contraction, SHAPE, rank, rtol=1e-7, max_steps=500, certify=True, scale=0.5
        )
        matrix = rearranged(0.5 * fisher_sum(samples), *SHAPE)
        sigma = torch.linalg.svdvals(matrix)[0].item()
        product = torch.outer(fit.left.flatten(), fit.right.flatten())
        missed = (matrix - product).norm().square().item()
        best = matrix.norm().square().item() - sigma**2
        assert fit.converged
        assert fit.sigma == pytest.approx(sigma, rel=3e-7)
        assert missed <= best + 6e-7 * sigma**2
        assert product.norm().item() == pytest.approx(fit.sigma, rel=3e-7)
        assert fit.relative_error == pytest.approx(missed**0.5 / matrix.norm().item(), rel=1e-6)
        assert_psd_and_symmetric(fit.left)
        assert_psd_and_symmetric(fit.right)


@pytest.mark.parametrize("plan", NAMES)
@pytest.mark.parametrize("power", [0.0, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("rank", [0, 1, 4, 8])
def test_stops_within_the_excess_and_says_what_is_left(plan: str, power: float, rank: int) -> None:
    """By default, by the SVD of the dense Fisher; rank 0 is the solver without a sketch.

    It is an estimate, and where sketches are poorer than any that is used, it is less good.
    """
    for seed in range(5):
        samples = samples_of(plan, seed, power=power)
        contraction = contraction_of(samples, plan)
        asked = {"rtol": None, "max_steps": 500, "scale": 1.0, "certify": False}
        if rank:
            fit = fit_from_sketch(contraction, SHAPE, rank, **asked)
        else:
            fit = fit_contraction(contraction, **asked)
        fisher = fisher_sum(samples)
        error = (fisher - torch.kron(fit.left, fit.right)).norm() / fisher.norm()
        sigma = torch.linalg.svdvals(rearranged(fisher, *SHAPE))[0]
        optimum = (1 - (sigma / fisher.norm()) ** 2).sqrt()
        assert -1e-12 < error - optimum <= (EXCESS if rank in (0, 8) else 10 * EXCESS)
        assert 0 <= fit.gap <= 0.05
        left = 1 - fit.sigma / sigma
        assert left <= 6 * fit.gap + 1e-10


def test_a_change_is_estimated_from_some_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(6000, 1, 24, generator=generator) @ falling(24, generator, 1.0)
    grads = torch.randn(1, 6000, 1, 20, generator=generator) @ falling(20, generator, 1.0)
    contraction = Primal(Samples(Rows(inputs), grads))
    coefficients = contraction.apply(torch.eye(20), "left")
    known = Formed(contraction.factor(coefficients, "right"), coefficients, "right")
    root = torch.randn(20, 3, generator=generator)
    probes = torch.randn(24, 4, generator=generator)
    found = {}
    for some in (single.SOME, 6000):
        monkeypatch.setattr(single, "SOME", some)
        found[some] = contraction.changed(known, root @ root.mT, 1.0, probes)
    assert (found[512] - found[6000]).norm() < 0.2 * found[6000].norm()
    assert not torch.equal(found[512], found[6000])


def test_samples_that_are_their_bias_alone_are_drawn_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """As of a ReLU that is dead: their inputs are zero, but for the constant."""
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(600, 1, 3, generator=generator)
    inputs[50:] = 0
    grads = torch.randn(1, 600, 1, 5, generator=generator)
    probes = torch.randn(4, 4, generator=generator)
    for zeros in (inputs, torch.zeros_like(inputs)):
        contraction = Primal(Samples(Rows(zeros, 0.7), grads))
        coefficients = contraction.apply(torch.eye(5), "left")
        known = Formed(contraction.factor(coefficients, "right"), coefficients, "right")
        found = {}
        for some in (500, 600):
            monkeypatch.setattr(single, "SOME", some)
            found[some] = contraction.changed(known, torch.eye(5), 2.0, probes)
        assert (found[500] - found[600]).norm() < 0.2 * found[600].norm()


@pytest.mark.parametrize("plan", NAMES)
@pytest.mark.parametrize("power", [0.5, 1.5])
@pytest.mark.parametrize("directions", [1, 2])
@pytest.mark.parametrize("apart", [0, 1, -1, -3])
def test_samples_that_have_nothing_in_common_with_others_are_not_missed(
    plan: str, power: float, directions: int, apart: int
) -> None:
    """The first or last few, whatever their number: a sketch without them is orthogonal to them."""
    o, i = SHAPE
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        N, T = (67, 1) if plan == "primal" else (9, 16)
        inputs, grads = torch.zeros(N, T, i), torch.zeros(directions, N, T, o)
        of = torch.zeros(N, dtype=torch.bool)
        of[slice(apart) if apart > 0 else slice(apart, None) if apart else slice(0)] = True
        for group, share, left, right in (
            (~of, 1.0, slice(0, o // 2), slice(0, i // 2)),
            (of, 2.5, slice(o // 2, o), slice(i // 2, i)),
        ):
            count = int(group.sum())
            rows = torch.randn(count, T, i // 2, generator=generator)
            inputs[group, :, right] = share * rows @ falling(i // 2, generator, power)
            rows = torch.randn(directions, count, T, o // 2, generator=generator)
            grads[:, group, :, left] = share * rows @ falling(o // 2, generator, power)
        samples = Samples(Rows(inputs), grads)
        contraction = contraction_of(samples, plan)
        fit = fit_from_sketch(
            contraction, SHAPE, 8, rtol=None, max_steps=500, certify=False, scale=1.0
        )
        fisher = fisher_sum(samples)
        error = (fisher - torch.kron(fit.left, fit.right)).norm() / fisher.norm()
        sigma = torch.linalg.svdvals(rearranged(fisher, *SHAPE))[0]
        assert error - (1 - (sigma / fisher.norm()) ** 2).sqrt() <= EXCESS


@pytest.mark.parametrize("plan", NAMES)
def test_suffices_where_gradients_are_of_low_rank(plan: str) -> None:
    for seed in range(5):
        contraction = contraction_of(samples_of(plan, seed, power=2.0), plan)
        fit = fit_from_sketch(
            contraction, SHAPE, 8, rtol=1e-6, max_steps=500, certify=False, scale=1.0
        )
        assert fit.steps <= 4
        assert fit.converged
        assert fit.relative_error is None


def opposite_factor(sizes: dict[Side, int], side: Side, generator: torch.Generator) -> Tensor:
    """A PSD factor on the side opposite to `side`."""
    size = sizes[opposite(side)]
    root = torch.randn(size, size, generator=generator)
    return root @ root.mT


@pytest.mark.parametrize("plan", NAMES)
@pytest.mark.parametrize("directions", [1, 3])
@pytest.mark.parametrize("constant", [None, 0.5])
def test_what_a_sketch_asks_of_a_plan(plan: str, directions: int, constant: float | None) -> None:
    samples = samples_of(plan, 5, directions=directions, constant=constant)
    contraction = contraction_of(samples, plan)
    generator = torch.Generator().manual_seed(7)
    sizes: dict[Side, int] = {"left": SHAPE[0], "right": SHAPE[1]}
    x = samples.gradients(0, samples.num_samples).flatten(0, 1)
    for side, size in sizes.items():
        rows = torch.randn(3, size, generator=generator)
        expected = contraction.apply(rows.mT @ rows, side)
        coefficients = contraction.apply_rows(rows, side)
        torch.testing.assert_close(coefficients, expected)

        if isinstance(contraction, Positions):
            representation = contraction.apply(
                opposite_factor(sizes, side, generator), opposite(side)
            )
            factor = contraction.factor(representation, side)
            found = contraction.times_factor(representation, side, rows.mT)
            torch.testing.assert_close(found, factor @ rows.mT)

        matrix = opposite_factor(sizes, opposite(side), generator)
        probes = torch.randn(sizes[opposite(side)], 4, generator=generator)
        image = contraction.factor(contraction.apply(matrix, side), opposite(side))
        first = contraction.factor(coefficients, opposite(side))
        known = Formed(first, coefficients, opposite(side))
        found = contraction.changed(known, matrix, 0.3, probes)
        torch.testing.assert_close(found, probes.mT @ (0.3 * image - first) @ probes)
        if isinstance(contraction, Primal):
            continue
        of_side = x if side == "right" else x.mT
        for matrices in (rows.mT, torch.randn(len(x), size, 2, generator=generator)):
            torch.testing.assert_close(contraction.carried(matrices, side), of_side @ matrices)


@pytest.mark.parametrize("plan", NAMES)
def test_zero_gradients(plan: str) -> None:
    samples = samples_of(plan, 0)
    for zero in (
        Samples(samples.inputs, torch.zeros_like(samples.grads)),
        Samples(Rows(torch.zeros_like(samples.inputs.tensor)), samples.grads),
    ):
        fit = fit_from_sketch(
            contraction_of(zero, plan), SHAPE, 8, rtol=1e-6, max_steps=50, certify=True, scale=1.0
        )
        assert not fit.left.any()
        assert not fit.right.any()
        assert fit.relative_error == 0.0


def test_close_singular_values_are_not_left_to_a_sketch() -> None:
    """Two groups of samples without anything in common: which is the larger, a sketch may miss."""
    generator = torch.Generator().manual_seed(0)
    inputs, grads = torch.zeros(200, 1, 24), torch.zeros(1, 200, 1, 20)
    for group, share in ((slice(0, 100), 1.0), (slice(100, 200), 0.99)):
        columns = slice(0, 10) if group.start == 0 else slice(10, 20)
        inputs[group, 0, columns] = torch.randn(100, 10, generator=generator) * share
        grads[0, group, 0, columns] = torch.randn(100, 10, generator=generator)
    samples = Samples(Rows(inputs), grads)
    sketch, _ = sketched(contraction_of(samples, "primal"), SHAPE, 8, Tolerance(1e-6))
    assert sketch is None or sketch.damping <= CLOSEST
    fit = fit_from_sketch(
        contraction_of(samples, "primal"),
        SHAPE,
        8,
        rtol=1e-9,
        max_steps=5000,
        certify=False,
        scale=1.0,
    )
    sigma = torch.linalg.svdvals(rearranged(fisher_sum(samples), *SHAPE))[0].item()
    assert fit.sigma == pytest.approx(sigma, rel=1e-6)


@pytest.mark.parametrize("plan", NAMES)
@pytest.mark.parametrize("scale", [1.0, 2.0**8, 2.0**-8])
def test_in_float32(plan: str, scale: float) -> None:
    """Scales as samples may have them that are left as they are: sigma goes by the fourth power."""
    for seed in range(3):
        samples = samples_of(plan, seed)
        samples = Samples(Rows(samples.inputs.tensor * scale), samples.grads * scale)
        half = Samples(Rows(samples.inputs.tensor.float()), samples.grads.float())
        fit = fit_from_sketch(
            contraction_of(half, plan), SHAPE, 6, rtol=1e-6, max_steps=500, certify=False, scale=1.0
        )
        sigma = torch.linalg.svdvals(rearranged(fisher_sum(samples), *SHAPE))[0].item()
        assert fit.sigma == pytest.approx(sigma, rel=3e-6)


def test_draws_nothing_from_the_global_generator() -> None:
    state = torch.get_rng_state()
    contraction = contraction_of(samples_of("positions", 0), "positions")
    sketch, _ = sketched(contraction, SHAPE, 4, Tolerance(1e-6))
    assert sketch is not None
    formed(contraction, sketch)
    assert torch.equal(torch.get_rng_state(), state)


def test_is_used_by_large_layers() -> None:
    """One of a transformer's layers, at its own size; and no small one."""
    size = Size(S=1, N=8, T=128, i=257, o=256)
    assert sketch_rank(size, "position_gram", 2**30, 4) == 32
    assert sketch_rank(size, "position_gram", 2**16, 4) == 0
    assert sketch_rank(Size(S=1, N=4096, T=1, i=1025, o=1024), "primal", 2**30, 4) == 64
    assert sketch_rank(Size(S=1, N=8, T=16, i=30, o=20), "position_gram", 2**30, 4) == 0
    assert set(NAMES) <= set(PLANS)
    generator = torch.Generator().manual_seed(0)
    mixing = falling(256, generator, 1.0)
    inputs = torch.randn(8, 128, 256, generator=generator) @ mixing
    grads = torch.randn(8, 128, 256, generator=generator) @ mixing
    samples = Samples(Rows(inputs.float()), grads.float()[None])
    fit = kfoc.KFOC().solve(samples, certify=False)
    plain = kfoc.KFOC(rtol=1e-9).solve(samples, certify=False)
    assert fit.steps < plain.steps
    assert fit.sigma == pytest.approx(plain.sigma, rel=1e-4)


@pytest.mark.parametrize(("power", "reduced"), [(0.0, False), (1.5, True)])
def test_white_noise_is_not_projected(power: float, reduced: bool) -> None:
    """A few directions do not have most of it, and what they tell would be of no use."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(300, 1, 80, generator=generator) @ falling(80, generator, power)
    grads = torch.randn(1, 300, 1, 10, generator=generator)
    contraction = Primal(Samples(Rows(inputs), grads))
    assert (contraction.projected(8) is not None) == reduced
    assert (sketched(contraction, (10, 80), 8, Tolerance(1e-6))[0] is not None) == reduced
