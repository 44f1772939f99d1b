"""Large sums of Kronecker products, which are solved with iteratively."""

from __future__ import annotations

import pytest
import torch

import kfoc
from curvatures import curvature, dense, flat, low_rank, power, psd, vector
from kfoc.blocks import iterative
from kfoc.blocks import low_rank as module

POWERS = {"matvec": 1, "solve": -1, "sqrt_matvec": 0.5, "inverse_sqrt_matvec": -0.5}


@pytest.fixture
def _iteratively(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "EIGEN_LIMIT", 0)


@pytest.mark.usefixtures("_iteratively")
@pytest.mark.parametrize("lead", [(), (2, 2)])
def test_powers(lead: tuple[int, ...]) -> None:
    found = curvature(low_rank(6, 5), kfoc.GroupedBlock((low_rank(2, 3), low_rank(2, 3))))
    v = vector(found, *lead)
    v = {name: tensor.clone() for name, tensor in v.items()}
    solved = found.damped(3.0).redamped(2.0, scale=0.5)
    matrix = 0.5 * dense(found) + 2 * torch.eye(42)
    assert torch.linalg.eigvalsh(dense(found))[0] < -1e-3
    for name, exponent in POWERS.items():
        expected = flat(found, v) @ power(matrix, exponent)
        result = flat(found, getattr(solved, name)(v))
        torch.testing.assert_close(result, expected, rtol=1e-8, atol=1e-10)
    assert solved.logdet() == pytest.approx(torch.logdet(matrix).item(), rel=1e-12)
    zeros = {name: torch.zeros_like(tensor) for name, tensor in v.items()}
    for name in POWERS:
        assert not flat(found, getattr(solved, name)(zeros)).any()


@pytest.mark.usefixtures("_iteratively")
def test_samples() -> None:
    found = curvature(low_rank(3, 2))
    draws = flat(found, found.sample(1000, 4.0, scale=2.0))
    covariance = power(2 * dense(found) + 4 * torch.eye(6), -1)
    deviation = (2 * covariance.diagonal()[:, None] * covariance.diagonal() / 1000).sqrt()
    assert ((draws.mT @ draws / 1000 - covariance).abs() < 5 * deviation).all()


@pytest.mark.usefixtures("_iteratively")
def test_log_determinant_by_quadrature(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the leading product leaves is estimated to a few percent of itself."""
    monkeypatch.setattr(module, "CHOLESKY_LIMIT", 0)
    found = curvature(low_rank(10, 12))
    expected = torch.logdet(dense(found) + 5 * torch.eye(120)).item()
    block = found["0"]
    leading = torch.kron(block.lefts[0], block.rights[0]) + 5 * torch.eye(120)
    rest = abs(torch.logdet(leading).item() - expected)
    assert found.logdet(5.0) == pytest.approx(expected, abs=0.1 * rest)


@pytest.mark.usefixtures("_iteratively")
def test_indefinite_directions_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    found = curvature(low_rank(4, 3))
    smallest = torch.linalg.eigvalsh(dense(found))[0].item()
    solved = found.damped(-smallest * 0.5)
    for operation in (solved.solve, solved.sqrt_matvec):
        with pytest.raises(ValueError, match=r"layer '0': .*not positive definite"):
            operation(vector(found))
    with pytest.raises(ValueError, match="not positive definite"):
        solved.logdet()
    monkeypatch.setattr(module, "CHOLESKY_LIMIT", 0)
    with pytest.raises(ValueError, match="not positive definite"):
        found.logdet(-smallest * 0.5)


@pytest.mark.usefixtures("_iteratively")
def test_what_does_not_converge_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    found = curvature(kfoc.LowRankBlock(torch.stack([psd(6), psd(6)]), torch.stack([psd(5)] * 2)))
    monkeypatch.setattr(iterative, "MAX_STEPS", 2)
    monkeypatch.setattr(iterative, "LANCZOS_STEPS", 10)
    with pytest.raises(ValueError, match="conjugate gradients left a relative residual"):
        found.solve(vector(found), 1e-6)
    with pytest.raises(ValueError, match="Lanczos did not settle in 10 steps"):
        found.inverse_sqrt_matvec(vector(found), 1e-6)


@pytest.mark.usefixtures("_iteratively")
def test_float32() -> None:
    found = curvature(low_rank(6, 5))
    v = {name: tensor.float() for name, tensor in vector(found, 2).items()}
    expected = flat(found, found.solve(v, 3.0))
    single = found.to(dtype=torch.float32)
    torch.testing.assert_close(flat(found, single.solve(v, 3.0)), expected, rtol=1e-4, atol=1e-4)
