import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import kfoc
from kfoc.pair import nearest_to_pair
from oracle import assert_psd_and_symmetric


def psd_terms(count: int, size: int, rank: int = 2) -> Tensor:
    roots = torch.randn(count, size, rank)
    return roots @ roots.mT


def svd_of_sum(lefts: Tensor, rights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return torch.linalg.svd(lefts.flatten(1).mT @ rights.flatten(1), full_matrices=False)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 6), st.integers(1, 5), st.integers(1, 7), st.integers(0, 10**6))
def test_psd_terms_reach_the_singular_value(count: int, o: int, i: int, seed: int) -> None:
    torch.manual_seed(seed)
    lefts, rights = psd_terms(count, o), psd_terms(count, i)
    fit = kfoc.nearest_kronecker(lefts, rights, rtol=0)
    u, s, v = svd_of_sum(lefts, rights)
    best = s[0] * torch.kron(u[:, 0].view(o, o), v[0].view(i, i))
    assert fit.sigma == pytest.approx(s[0].item(), rel=1e-10)
    if len(s) < 2 or s[1] < 0.9 * s[0]:
        torch.testing.assert_close(torch.kron(fit.left, fit.right), best, rtol=1e-5, atol=1e-6)
    error = s[1:].norm() / s.norm()
    assert fit.relative_error == pytest.approx(error.item(), abs=1e-7)
    assert_psd_and_symmetric(fit.left)
    assert_psd_and_symmetric(fit.right)
    assert fit.left.norm().item() == pytest.approx(math.sqrt(fit.sigma))


def test_terms_of_any_sign_and_no_symmetry() -> None:
    lefts, rights = torch.randn(9, 3, 3), torch.randn(9, 4, 4)
    fit = kfoc.nearest_kronecker(lefts, rights, rtol=0, max_steps=10_000)
    u, s, v = svd_of_sum(lefts, rights)
    best = s[0] * torch.kron(u[:, 0].view(3, 3), v[0].view(4, 4))
    torch.testing.assert_close(torch.kron(fit.left, fit.right), best, rtol=1e-6, atol=1e-6)
    assert fit.left.diagonal().sum() >= 0


def test_start_orthogonal_to_the_optimum_is_not_a_trap() -> None:
    # From the identity the iteration stays in the second singular triple: the first has trace 0.
    traceless = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    lefts = torch.stack([traceless, torch.eye(2)])
    rights = torch.stack([5 * traceless, torch.eye(2)])
    fit = kfoc.nearest_kronecker(lefts, rights, rtol=0)
    assert fit.sigma == pytest.approx(10.0)
    torch.testing.assert_close(
        torch.kron(fit.left, fit.right), 5 * torch.kron(traceless, traceless), rtol=0, atol=1e-8
    )


def test_steps_and_convergence_are_reported() -> None:
    lefts, rights = psd_terms(30, 4), psd_terms(30, 5)
    assert kfoc.nearest_kronecker(lefts, rights).converged
    stopped = kfoc.nearest_kronecker(lefts, rights, rtol=1e-15, max_steps=1)
    assert stopped.steps == 1
    assert not stopped.converged


def test_tied_singular_values_still_give_an_optimum() -> None:
    units = torch.zeros(2, 2, 2)
    units[0, 0, 0] = units[1, 1, 1] = 1
    fit = kfoc.nearest_kronecker(units, units)
    assert fit.sigma == pytest.approx(1.0)
    assert fit.relative_error == pytest.approx(math.sqrt(0.5))


@pytest.mark.parametrize("scale", [1e-20, 1e15])
def test_extreme_scales_in_float32(scale: float) -> None:
    lefts, rights = psd_terms(5, 3), psd_terms(5, 4)
    expected = kfoc.nearest_kronecker(lefts, rights)
    found = kfoc.nearest_kronecker((lefts * scale).float(), (rights / scale).float())
    assert found.sigma == pytest.approx(expected.sigma, rel=1e-5)
    assert found.left.isfinite().all()


def test_zero_sum_gives_zeros() -> None:
    fit = kfoc.nearest_kronecker(torch.zeros(2, 3, 3), torch.zeros(2, 2, 2))
    assert not fit.left.any()
    assert not fit.right.any()
    assert (fit.sigma, fit.relative_error) == (0.0, 0.0)


@pytest.mark.parametrize(
    ("lefts", "rights", "match"),
    [
        (torch.zeros(2, 3, 4), torch.zeros(2, 2, 2), "lefts must have shape"),
        (torch.zeros(2, 3, 3), torch.zeros(3, 2, 2), "same number of terms, found 2 and 3"),
        (torch.zeros(0, 3, 3), torch.zeros(0, 2, 2), "K >= 1"),
        (torch.zeros(2, 3, 3), torch.full((2, 2, 2), math.nan), "rights has values"),
        (torch.zeros(2, 3, 3).long(), torch.zeros(2, 2, 2), "floating point"),
        (torch.zeros(2, 3, 3).float(), torch.zeros(2, 2, 2).double(), "share dtype"),
    ],
)
def test_bad_terms(lefts: Tensor, rights: Tensor, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        kfoc.nearest_kronecker(lefts, rights)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 5), st.integers(1, 6), st.floats(1e-6, 1e6), st.integers(0, 10**6))
def test_pair_in_closed_form_is_algorithm_1(o: int, i: int, weight: float, seed: int) -> None:
    torch.manual_seed(seed)
    lefts, rights = psd_terms(2, o), psd_terms(2, i)
    lefts[1] *= weight
    left, right = nearest_to_pair((lefts[0], rights[0]), (lefts[1], rights[1]))
    iterated = kfoc.nearest_kronecker(lefts, rights, rtol=0, max_steps=100_000)
    assert left.norm() * right.norm() == pytest.approx(iterated.sigma, rel=1e-9)
    best = torch.kron(iterated.left, iterated.right)
    torch.testing.assert_close(
        torch.kron(left, right), best, rtol=1e-4, atol=1e-5 * best.abs().max().item()
    )


def test_pair_of_nearly_equal_terms_and_of_zeros() -> None:
    term = psd_terms(1, 3)[0], psd_terms(1, 4)[0]
    near = term[0] * (1 + 1e-13), term[1]
    left, right = nearest_to_pair(term, near)
    torch.testing.assert_close(torch.kron(left, right), 2 * torch.kron(*term))
    zero = torch.zeros(3, 3), torch.zeros(4, 4)
    for pair in ((term, zero), (zero, term)):
        torch.testing.assert_close(torch.kron(*nearest_to_pair(*pair)), torch.kron(*term))
    assert not torch.kron(*nearest_to_pair(zero, zero)).any()
