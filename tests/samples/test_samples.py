"""Algorithm 2: every plan against the dense Fisher and its SVD."""

import itertools

import pytest
import torch
from torch import Tensor

import kfoc
from kfoc.plans.choose import PLANS, contract
from kfoc.samples.inputs import Rows
from kfoc.samples.linear import Samples
from kfoc.samples.patches import Patches
from oracle import assert_psd_and_symmetric, optimum, rearranged

SHAPES = {  # (S, N, T, i, o)
    "plain": (1, 12, 1, 5, 3),
    "directions": (3, 9, 1, 4, 3),
    "few samples": (1, 2, 1, 6, 5),
    "many samples": (2, 300, 1, 3, 2),
    "positions": (1, 8, 6, 4, 3),
    "positions and directions": (2, 7, 3, 5, 2),
    "scalars": (1, 5, 1, 1, 1),
    "one sample": (1, 1, 4, 3, 2),
}
TIGHT = 200  # bytes: every plan that can chunk has to


def draw(shape: tuple[int, int, int, int, int]) -> tuple[Tensor, Tensor]:
    S, N, T, i, o = shape
    return torch.randn(N, T, i), torch.randn(S, N, T, o)


def dense(inputs: Tensor, grads: Tensor) -> Tensor:
    x = torch.einsum("snto,nti->snoi", grads, inputs).flatten(2).flatten(0, 1)
    return x.mT @ x / len(inputs)


def plans_for(shape: tuple[int, ...]) -> list[str]:
    return [p for p in PLANS if shape[2] == 1 or p not in ("gram", "primal")]


CASES = [(name, plan) for name, shape in SHAPES.items() for plan in plans_for(shape)]


@pytest.mark.parametrize(("name", "plan"), CASES)
@pytest.mark.parametrize("limit", [2**30, TIGHT])
def test_plan_finds_the_optimum(name: str, plan: str, limit: int) -> None:
    inputs, grads = draw(SHAPES[name])
    o, i = grads.shape[-1], inputs.shape[-1]
    fit = kfoc.nearest_kronecker_of_samples(
        inputs, grads, plan=plan, rtol=0, max_steps=5000, memory_limit=limit
    )
    best, sigma, error = optimum(dense(inputs, grads), o, i)
    assert fit.plan == plan
    assert fit.converged
    assert fit.sigma == pytest.approx(sigma, rel=1e-10)
    torch.testing.assert_close(torch.kron(fit.left, fit.right), best, rtol=1e-8, atol=1e-8)
    assert fit.relative_error == pytest.approx(error, abs=1e-7)
    assert_psd_and_symmetric(fit.left)
    assert_psd_and_symmetric(fit.right)


@pytest.mark.parametrize(("name", "plan"), CASES)
def test_half_steps_are_products_with_the_rearranged_fisher(name: str, plan: str) -> None:
    inputs, grads = draw(SHAPES[name])
    o, i, count = grads.shape[-1], inputs.shape[-1], len(inputs)
    operator = rearranged(dense(inputs, grads) * count, o, i)
    contraction = contract(Samples(Rows(inputs), grads), plan=plan)
    left, right = torch.randn(o, o), torch.randn(i, i)
    left, right = left @ left.mT, right @ right.mT
    v, w = contraction.apply(left, "left"), contraction.apply(right, "right")
    image_left = (operator @ right.flatten()).view(o, o)
    image_right = (left.flatten() @ operator).view(i, i)
    close = torch.testing.assert_close
    close(contraction.factor(v, "right"), image_right)
    close(contraction.factor(w, "left"), image_left)
    start = (operator @ torch.eye(i).flatten()).view(o, o) / i**0.5
    close(contraction.factor(contraction.start(), "left"), start)
    close(
        contraction.factor(contraction.advance(v, "right"), "left"),
        (operator @ image_right.flatten()).view(o, o),
    )
    close(
        contraction.factor(contraction.advance(w, "left"), "right"),
        (image_left.flatten() @ operator).view(i, i),
    )
    close(contraction.inner(w, contraction.start(), "left"), (image_left * start).sum())
    close(contraction.inner(v, v, "right"), image_right.square().sum())
    close(contraction.overlap(w, left, v, "left"), (image_left * left).sum())
    close(contraction.overlap(v, right, w, "right"), (image_right * right).sum())
    assert contraction.squared_norm() == pytest.approx(operator.square().sum().item())


def test_plan_is_chosen_and_named() -> None:
    for shape in SHAPES.values():
        assert kfoc.nearest_kronecker_of_samples(*draw(shape)).plan in PLANS


@pytest.mark.parametrize("constant", [None, 0.5])
@pytest.mark.parametrize(
    "shape", [(1, 9, 1, 4, 1), (3, 9, 1, 4, 1), (1, 9, 5, 4, 1), (2, 9, 5, 4, 1)]
)
def test_one_output_needs_no_iteration(
    shape: tuple[int, int, int, int, int], constant: float | None
) -> None:
    inputs, grads = draw(shape)
    samples = Samples(Rows(inputs, constant), grads * 1e-9)
    if constant is not None:
        inputs = torch.nn.functional.pad(inputs, (0, 1), value=constant)
    fisher = dense(inputs, grads * 1e-9)
    fit = kfoc.KFOC().solve(samples, certify=False)
    assert (fit.steps, fit.converged, fit.relative_error) == (0, True, 0.0)
    assert fit.sigma == pytest.approx(fisher.norm().item(), rel=1e-12)
    torch.testing.assert_close(torch.kron(fit.left, fit.right), fisher, rtol=1e-12, atol=0)
    assert fit.left.norm().item() == pytest.approx(fit.right.norm().item(), rel=1e-12)
    assert torch.equal(fit.right, fit.right.mT)
    silent = kfoc.KFOC().solve(Samples(Rows(inputs), grads * 0), certify=False)
    assert silent.sigma == 0
    assert not silent.left.any()
    assert not silent.right.any()


@pytest.mark.parametrize("plan", ["gram", "primal", "gradients", "dense"])
@pytest.mark.parametrize(("a", "g"), [(1e-9, 1e-12), (1e12, 1e3), (1.0, 1e-20), (1e15, 1e-18)])
def test_extreme_magnitudes_in_float32(plan: str, a: float, g: float) -> None:
    inputs, grads = draw(SHAPES["plain"])
    expected = kfoc.nearest_kronecker_of_samples(inputs, grads, plan=plan)
    found = kfoc.nearest_kronecker_of_samples((inputs * a).float(), (grads * g).float(), plan=plan)
    assert found.sigma == pytest.approx(expected.sigma * (a * g) ** 2, rel=1e-4)
    assert found.relative_error == pytest.approx(expected.relative_error, rel=1e-3)
    assert found.left.isfinite().all()
    assert found.right.isfinite().all()


def test_stopping_is_honest_for_slow_iterations() -> None:
    # sigma_2 close to sigma_1: rises shrink by little, and much is left when one is below rtol.
    count = 40
    inputs = torch.eye(count)[:, None] * torch.linspace(1, 0.999, count)[:, None, None]
    grads = torch.eye(count)[None, :, None] + 1e-3 * torch.randn(1, count, 1, count)
    fit = kfoc.nearest_kronecker_of_samples(inputs, grads, rtol=1e-6, max_steps=100_000)
    # The largest eigenvalue of the two Gram matrices' product is sigma_1^2.
    values = torch.linalg.eigvals(
        (inputs[:, 0] @ inputs[:, 0].mT).square() @ (grads[0, :, 0] @ grads[0, :, 0].mT).square()
    ).real
    best = values.max().sqrt().item() / count
    assert fit.sigma == pytest.approx(best, rel=1e-4)


def test_zero_and_duplicate_samples() -> None:
    inputs, grads = draw(SHAPES["plain"])
    zero = kfoc.nearest_kronecker_of_samples(inputs, grads * 0)
    assert not zero.left.any()
    assert not zero.right.any()
    assert zero.relative_error == 0.0
    once = kfoc.nearest_kronecker_of_samples(inputs[:1], grads[:, :1])
    many = kfoc.nearest_kronecker_of_samples(
        inputs[:1].repeat(7, 1, 1), grads[:, :1].repeat(1, 7, 1, 1)
    )
    torch.testing.assert_close(torch.kron(once.left, once.right), torch.kron(many.left, many.right))
    assert once.relative_error == pytest.approx(0.0, abs=1e-7)


def test_bad_samples() -> None:
    inputs, grads = draw(SHAPES["positions"])
    for a, g, match in (
        (inputs[0], grads, "inputs must be"),
        (inputs[:3], grads, "same N and T"),
        (inputs[:0], grads[:, :0], "must not be empty"),
        (inputs.float(), grads, "share a floating-point dtype"),
        (inputs * torch.nan, grads, "inputs has values that are not finite"),
        (inputs, grads / 0, "grads has values that are not finite"),
    ):
        with pytest.raises(ValueError, match=match):
            kfoc.nearest_kronecker_of_samples(a, g)
    with pytest.raises(ValueError, match=r"one position, found T = 6"):
        kfoc.nearest_kronecker_of_samples(inputs, grads, plan="gram")
    with pytest.raises(ValueError, match=r"plan must be one of .*gram.* found 'magic'"):
        kfoc.nearest_kronecker_of_samples(inputs, grads, plan="magic")


@pytest.mark.parametrize(
    ("dims", "stride", "dilation"), list(itertools.product([1, 2, 3], [1, 2], [1, 2]))
)
def test_patches_are_the_products_that_a_convolution_sums(
    dims: int, stride: int, dilation: int
) -> None:
    space = (7, 6, 8)[:dims]
    kernel = (3, 2, 3)[:dims]
    x = torch.randn(4, 2, *space)
    weight, bias = torch.randn(5, 2, *kernel), torch.randn(5)
    convolve = (torch.conv1d, torch.conv2d, torch.conv3d)[dims - 1]
    expected = convolve(x, weight, bias, stride=stride, dilation=dilation).flatten(2)
    patches = Patches(x, kernel, (stride,) * dims, (dilation,) * dims, 1.0)
    columns = patches.columns(1, 4)
    extended = torch.cat([weight.flatten(1), bias[:, None]], 1)
    torch.testing.assert_close(torch.einsum("oi,int->not", extended, columns), expected[1:])
    assert columns.shape == (patches.size, 3, patches.num_positions)
