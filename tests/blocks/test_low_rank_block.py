"""Solves with sums of Kronecker products: dense where they are small, refused where not."""

from __future__ import annotations

import math
import re
from collections.abc import Callable

import pytest
import torch
from torch import nn

import kfoc
from curvatures import block, curvature, dense, flat, low_rank, power, vector
from kfoc.applications.preconditioner import Preconditioner
from kfoc.blocks import Damping
from kfoc.blocks import low_rank as module

POWERS = {"matvec": 1, "solve": -1, "sqrt_matvec": 0.5, "inverse_sqrt_matvec": -0.5}


def large() -> kfoc.LowRankBlock:
    """33 x 32 = 1,056 parameters, a product more than is solved with."""
    halves = [torch.randn(2, n, n) for n in (33, 32)]
    return kfoc.LowRankBlock(*(half + half.mT for half in halves))


def refusal(o: int, i: int, rank: int, layer: str = "") -> str:
    """What a refused operation says, as a pattern."""
    start = f"layer '{layer}': " if layer else "^"
    return start + re.escape(
        f"a sum of {rank} Kronecker products has no factored inverse, and with {o} x {i} = {o * i} "
        "parameters it is too large for a dense one (at most 1024): for solves, roots, "
        "determinants and samples fit kfoc.EigenCorrected(kfoc.KFOC()) (EK-FOC), or kfoc.KFOC() of "
        "rank=1"
    )


@pytest.mark.parametrize("lead", [(), (2, 2)])
def test_small_ones_are_solved_with_densely(lead: tuple[int, ...]) -> None:
    found = curvature(low_rank(6, 5), kfoc.GroupedBlock((low_rank(2, 3), low_rank(2, 3))))
    v = vector(found, *lead)
    solved = found.damped(3.0).redamped(2.0, scale=0.5)
    matrix = 0.5 * dense(found) + 2 * torch.eye(42)
    assert torch.linalg.eigvalsh(dense(found))[0] < -1e-3
    for name, exponent in POWERS.items():
        expected = flat(found, v) @ power(matrix, exponent)
        result = flat(found, getattr(solved, name)(v))
        torch.testing.assert_close(result, expected, rtol=1e-10, atol=1e-11)
    assert solved.logdet() == pytest.approx(torch.logdet(matrix).item(), rel=1e-12)
    # A draw is the root of the inverse times the noise of its seed, layer by layer.
    draws = flat(found, solved.sample(3, seed=4))
    generator = torch.Generator().manual_seed(4)
    noise = [torch.randn(3, *b.shape, generator=generator).flatten(1) for b in found.values()]
    torch.testing.assert_close(draws, torch.cat(noise, 1) @ power(matrix, -0.5), rtol=1e-9, atol=0)


def test_the_largest_that_is_solved_with() -> None:
    found = curvature(low_rank(32, 32))
    assert math.prod(found["0"].shape) == module.EIGEN_LIMIT == 1024
    damping = 1 - torch.linalg.eigvalsh(dense(found))[0].item()
    v, matrix = vector(found), dense(found) + damping * torch.eye(1024)
    expected = torch.linalg.solve(matrix, flat(found, v))
    torch.testing.assert_close(flat(found, found.solve(v, damping)), expected)
    assert found.logdet(damping) == pytest.approx(torch.logdet(matrix).item(), rel=1e-12)


V = dict[str, torch.Tensor]
REFUSED: dict[str, Callable[[kfoc.Curvature, V], object]] = {
    "damped": lambda c, v: c.damped(1e6),
    "damped by layer": lambda c, v: c.damped(dict.fromkeys(c, 1e6)),
    "damped, pi": lambda c, v: c.damped(1e6, method="pi"),
    "solve": lambda c, v: c.solve(v, 1e6),
    "sqrt_matvec": lambda c, v: c.sqrt_matvec(v, 1e6),
    "inverse_sqrt_matvec": lambda c, v: c.inverse_sqrt_matvec(v, 1e6),
    "logdet": lambda c, v: c.logdet(1e6),
    "sample": lambda c, v: c.sample(2, 1e6),
    "preconditioner": lambda c, v: Preconditioner.of(c, 1e6),
}


@pytest.mark.parametrize("name", REFUSED)
def test_large_ones_are_refused_by_layer(name: str) -> None:
    """Also where all other layers are small; a group of a layer counts by itself."""
    found = curvature(block("KroneckerBlock"), low_rank(4, 3), large())
    with pytest.raises(ValueError, match=refusal(33, 32, 2, layer="2")):
        REFUSED[name](found, vector(found))
    found = curvature(kfoc.GroupedBlock((low_rank(2, 32), large())))
    with pytest.raises(ValueError, match=refusal(33, 32, 2, layer="0")):
        REFUSED[name](found, vector(found))
    groups = curvature(kfoc.GroupedBlock(tuple(low_rank(2, 3) for _ in range(200))))
    assert math.prod(groups["0"].shape) == 1200
    assert groups["0"].damped(Damping(100.0)).logdet() > 0


def test_a_large_one_by_itself_is_refused_without_a_layer() -> None:
    with pytest.raises(ValueError, match=refusal(33, 32, 2)):
        large().damped(Damping(1e6))


def test_what_large_ones_have_all_the_same() -> None:
    found, other = curvature(large()), curvature(block("KroneckerBlock", 33, 32))
    matrix, v = dense(found), vector(found, 2)
    flattened = flat(found, v)
    torch.testing.assert_close(flat(found, found.matvec(v)), flattened @ matrix)
    expected = ((flattened @ matrix) * flattened).sum(1)
    torch.testing.assert_close(found.quadratic_form(v), expected)
    assert found.trace() == pytest.approx(matrix.trace().item(), rel=1e-9)
    assert found.frobenius_norm() == pytest.approx(matrix.norm().item(), rel=1e-9)
    distance = (matrix - dense(other)).norm() / matrix.norm()
    compared = found.compare(other)["0"]
    assert compared.relative_distance == pytest.approx(distance.item(), rel=1e-9)
    torch.testing.assert_close(dense(0.5 * found + 0.5 * found), 0.5 * matrix)


def fitted() -> tuple[nn.Sequential, list, kfoc.Curvature]:
    """Layer "0" of 30 x 41 parameters, and "2" of 3 x 31."""
    model = nn.Sequential(nn.Linear(40, 30), nn.Tanh(), nn.Linear(30, 3))
    data = [(torch.randn(60, 40), torch.randint(3, (60,)))]
    return model, data, kfoc.fit(model, data, estimator=kfoc.KFOC(rank=2), probes=8)


def test_fits_and_their_certificates_have_no_limit() -> None:
    _, _, found = fitted()
    assert all(isinstance(each, kfoc.LowRankBlock) for each in found.values())
    assert all(each.relative_error is not None for each in found.values())


USES: dict[str, Callable[[kfoc.Laplace, list], object]] = {
    "posterior": lambda p, data: p.posterior,
    "sample": lambda p, data: p.sample(2),
    "linearised": lambda p, data: p.linearised(data[0][0]),
    "probabilities": lambda p, data: p.probabilities(data[0][0]),
    "evidence": lambda p, data: p.log_marginal_likelihood(data),
    "tuned": lambda p, data: p.tuned(data),
    "validated": lambda p, data: p.tuned_by_validation(data),
}


def test_a_posterior_names_the_layer() -> None:
    """Nothing is computed before it is asked for, and everything that is asks the same."""
    model, data, found = fitted()
    laplace = kfoc.Laplace(model, found, 1e6)
    for use in USES.values():
        with pytest.raises(ValueError, match=refusal(30, 41, 2, layer="0")):
            use(laplace, data)
    # Of the small layer alone there is one.
    found = kfoc.fit(model, data, estimator=kfoc.KFOC(rank=2), layers="2")
    assert kfoc.Laplace(model, found, 1e6).linearised(data[0][0]).mean.shape == (60, 3)


def test_influence_and_natural_gradients_name_the_layer() -> None:
    model, data, found = fitted()
    with pytest.raises(ValueError, match=refusal(30, 41, 2, layer="0")):
        kfoc.influence(model, found, data, data[0], damping=1e6)
    optimizer = kfoc.NaturalGradient(model, estimator=kfoc.KFOC(rank=2), decay=1.0, damping=1e6)
    optimizer.observe(data[0][0])
    nn.functional.cross_entropy(model(data[0][0]), data[0][1]).backward()
    before = model[0].weight.detach().clone()
    with pytest.raises(ValueError, match=refusal(30, 41, 2, layer="0")):
        optimizer.step()
    assert torch.equal(model[0].weight, before)


def test_indefinite_ones_are_refused_under_too_small_a_damping() -> None:
    found = curvature(block("KroneckerBlock"), low_rank(4, 3))
    smallest = torch.linalg.eigvalsh(found["1"].to_dense())[0].item()
    assert smallest < -1e-3
    for scale in (1.0, 10.0):
        solved = found.damped(-smallest * scale * 0.99, scale=scale)
        message = r"layer '1': .*indefinite \(smallest eigenvalue"
        for name in set(POWERS) - {"matvec"}:
            with pytest.raises(ValueError, match=message):
                getattr(solved, name)(vector(found))
        for operation in (solved.logdet, solved.sample):
            with pytest.raises(ValueError, match=message):
                operation()
        assert math.isfinite(solved.redamped(-smallest * scale * 1.01, scale=scale).logdet())


def test_float32() -> None:
    found = curvature(low_rank(6, 5))
    v = {name: tensor.float() for name, tensor in vector(found, 2).items()}
    expected = flat(found, found.solve(v, 3.0))
    single = found.to(dtype=torch.float32)
    torch.testing.assert_close(flat(found, single.solve(v, 3.0)), expected, rtol=1e-4, atol=1e-4)
