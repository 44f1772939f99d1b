"""The accelerated solver against the rearranged Fisher and its SVD."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import kfoc
from kfoc.nearest import accelerated
from kfoc.nearest.accelerated import fit_contraction, leading_pair
from kfoc.nearest.contraction import positive
from kfoc.nearest.power import EXCESS, Tolerance, power_iteration
from kfoc.plans.choose import contract
from kfoc.samples.inputs import Rows
from kfoc.samples.linear import Samples
from oracle import assert_psd_and_symmetric, rearranged

PLANS = ["primal", "positions", "position_gram", "gradients"]  # whose half steps are worth saving


def slow(plan: str, seed: int) -> tuple[Samples, Tensor]:
    """Samples of few, nearly orthogonal gradients, whose singular values are close; and their F."""
    generator = torch.Generator().manual_seed(seed)
    N, T, i, o = (9, 1, 7, 6) if plan == "primal" else (6, 4, 7, 6)
    inputs = torch.randn(N, T, i, generator=generator)
    grads = torch.randn(1, N, T, o, generator=generator)
    x = torch.einsum("snto,nti->noi", grads, inputs).flatten(1)
    return Samples(Rows(inputs), grads), x.mT @ x / N


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("seed", range(12))
def test_slow_problems(plan: str, seed: int) -> None:
    samples, fisher = slow(plan, seed)
    contraction = contract(samples, plan=plan)
    fit = fit_contraction(contraction, rtol=1e-9, max_steps=500, scale=1 / samples.num_samples)
    matrix = rearranged(fisher, 6, 7)
    sigma = torch.linalg.svdvals(matrix)[0].item()
    assert fit.converged
    assert fit.sigma == pytest.approx(sigma, rel=2e-8)
    product = torch.outer(fit.left.flatten(), fit.right.flatten())
    missed = (matrix - product).norm().square().item()
    assert missed <= (matrix.norm().square().item() - sigma**2) * (1 + 1e-7)
    assert_psd_and_symmetric(fit.left)
    assert_psd_and_symmetric(fit.right)


@pytest.mark.parametrize("plan", PLANS)
def test_takes_fewer_half_steps_than_the_power_iteration(plan: str) -> None:
    ours = theirs = 0
    for seed in range(12):
        contraction = contract(slow(plan, seed)[0], plan=plan)
        ours += leading_pair(contraction, Tolerance(1e-9), 5000).steps
        start = contraction.start()
        theirs += power_iteration(contraction, start, "left", Tolerance(1e-9), 5000).steps
    assert ours < 0.6 * theirs


@pytest.mark.parametrize("plan", PLANS)
def test_a_result_outside_the_cone_is_not_returned(
    plan: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    contraction = contract(slow(plan, 1)[0], plan=plan)
    monkeypatch.setattr(contraction, "positive", lambda representation, side: False)
    found = leading_pair(contraction, Tolerance(1e-9), 5000)
    start = contraction.start()
    plain = power_iteration(contraction, start, "left", Tolerance(1e-9), 5000)
    assert (found.sigma, found.steps) == (plain.sigma, plain.steps)


@pytest.mark.parametrize("plan", PLANS)
def test_large_factors_do_without_a_basis(plan: str, monkeypatch: pytest.MonkeyPatch) -> None:
    contraction = contract(slow(plan, 2)[0], plan=plan)
    start = contraction.start()
    plain = power_iteration(contraction, start, "left", Tolerance(1e-9), 5000)
    monkeypatch.setattr(accelerated, "BASIS_LIMIT", 1)
    found = leading_pair(contraction, Tolerance(1e-9), 5000)
    assert found.steps == plain.steps
    assert found.sigma == pytest.approx(plain.sigma, rel=1e-12)


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("limit", [1, 3, 5, 6, 7, 8])
def test_keeps_to_the_step_limit(plan: str, limit: int) -> None:
    contraction = contract(slow(plan, 3)[0], plan=plan)
    found = leading_pair(contraction, Tolerance(1e-14), limit)
    assert found.steps <= limit
    assert not found.converged


def with_a_large_sample(plan: str, seed: int) -> tuple[Samples, Tensor]:
    """Samples of which the first is as large as many others; and their F, summed."""
    generator = torch.Generator().manual_seed(seed)
    N, T = (40, 1) if plan in ("primal", "gram") else (12, 3)
    inputs = torch.randn(N, T, 6, generator=generator) + 0.5 * torch.randn(6, generator=generator)
    grads = torch.randn(1, N, T, 5, generator=generator)
    root = 10 ** (0.75 * torch.rand(1, generator=generator).item())
    inputs[0] *= root
    grads[:, 0] *= root
    x = torch.einsum("snto,nti->noi", grads, inputs).flatten(1)
    return Samples(Rows(inputs), grads), x.mT @ x


@pytest.mark.parametrize("plan", [*PLANS, "gram", "dense"])
@pytest.mark.parametrize("certify", [False, True])
def test_is_within_the_excess_and_what_it_says_of_itself(plan: str, certify: bool) -> None:
    """Whether the norm of F is known or not; few rises tell little of a sample that stands out."""
    for seed in range(50):
        samples, fisher = with_a_large_sample(plan, seed)
        contraction = contract(samples, plan=plan)
        fit = fit_contraction(contraction, rtol=None, max_steps=500, certify=certify, scale=0.5)
        product = torch.kron(fit.left, fit.right)
        error = (0.5 * fisher - product).norm() / fisher.norm() / 0.5
        values = torch.linalg.svdvals(rearranged(fisher, 5, 6))
        assert error - values[1:].norm() / values.norm() <= EXCESS
        assert fit.sigma == pytest.approx(product.norm().item(), rel=1e-12)
        assert fit.left.norm().item() == pytest.approx(fit.right.norm().item(), rel=1e-12)
        if certify:
            assert fit.relative_error == pytest.approx(error.item(), rel=1e-9)


def test_psd_check() -> None:
    assert positive(torch.eye(3))
    assert positive(torch.zeros(2, 3, 3))
    assert positive(torch.ones(3, 3))
    assert not positive(torch.diag(torch.tensor([1.0, -1e-6, 1.0])))
    assert not positive(torch.stack([torch.eye(3), -torch.eye(3)]))


@pytest.mark.parametrize(
    "scales",
    [(2**-3, 2**-6), (2**-6, 2**-3), (1.0, 2**-7), (2**-7, 2**-7), (2**7, 2**-5), (2**7, 2**7)],
)
@pytest.mark.parametrize(
    ("plan", "shape"),
    [("primal", (1, 1, 1, 1)), *((plan, (9, 1, 5, 4)) for plan in ("primal", "gram", "gradients"))]
    + [(plan, (9, 3, 5, 4)) for plan in ("gradients", "positions", "position_gram", "dense")],
)
def test_sigmas_whose_powers_leave_the_range(
    plan: str, shape: tuple[int, int, int, int], scales: tuple[float, float]
) -> None:
    """Samples of scales that are left as they are; some layers once got zero factors in float32."""
    count, positions, o, i = shape
    generator = torch.Generator().manual_seed(3)
    inputs = torch.randn(count, positions, i, generator=generator)
    grads = torch.randn(1, count, positions, o, generator=generator)
    scale = (scales[0] * scales[1]) ** 2
    found = kfoc.nearest_kronecker_of_samples(
        (inputs * scales[0]).float(), (grads * scales[1]).float(), plan=plan, rtol=1e-6
    )
    expected = kfoc.nearest_kronecker_of_samples(inputs, grads, rtol=0.0)
    assert found.sigma == pytest.approx(expected.sigma * scale, rel=1e-4)
    product = torch.kron(found.left, found.right).double() / scale
    optimum = torch.kron(expected.left, expected.right)
    assert (product - optimum).norm() < 0.01 * optimum.norm()
    assert found.converged
