"""The power iteration against the dense SVD, and put away between half steps."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from kfoc.files.encoding import decoded, encoded
from kfoc.nearest.power import PowerIteration, Tolerance


def with_values(values: list[float]) -> Tensor:
    """A matrix (9, 16) of these singular values."""
    generator = torch.Generator().manual_seed(3)
    sides = [
        torch.linalg.qr(torch.randn(n, len(values), generator=generator, dtype=torch.float64))[0]
        for n in (9, 16)
    ]
    return sides[0] * torch.tensor(values, dtype=torch.float64) @ sides[1].mT


def begun(matrix: Tensor, rtol: float, max_steps: int = 1000) -> PowerIteration:
    start = torch.ones(len(matrix), dtype=matrix.dtype)
    return PowerIteration("left", start / start.norm(), Tolerance(rtol), max_steps)


def step(it: PowerIteration, matrix: Tensor) -> Tensor:
    factor, side = it.ask()
    image = (matrix.mT if side == "left" else matrix) @ factor / it.norm
    it.tell(image, image.norm().item())
    return image


def run(it: PowerIteration, matrix: Tensor) -> Tensor:
    while not it.done:
        image = step(it, matrix)
    return image


# A slow one at a coarse tolerance is none of them: it stops before its rises show how slow it is.
@pytest.mark.parametrize(
    ("second", "rtol"), [(0.2, 1e-3), (0.7, 1e-3), (0.2, 1e-8), (0.7, 1e-8), (0.97, 1e-8)]
)
def test_sigma_settles_within_its_tolerance(second: float, rtol: float) -> None:
    matrix = with_values([5.0, 5 * second, 1.0])
    it = begun(matrix, rtol)
    image = run(it, matrix)
    sigma = torch.linalg.svdvals(matrix)[0].item()
    assert it.converged
    assert 0 <= 1 - it.sigmas[-1] / sigma <= 1.05 * rtol
    # Rises are noticed where they stop, not many half steps beyond.
    soon = next(k for k, value in enumerate(it.sigmas, 1) if 1 - value / sigma <= rtol)
    assert it.steps == len(it.sigmas) <= max(soon, 3) + 3
    assert it.sigmas == sorted(it.sigmas)
    assert it.sigmas[-1] == pytest.approx(image.norm().item(), rel=1e-14)


@pytest.mark.parametrize("max_steps", [1000, 7, 8])
def test_the_last_factor_and_its_image(max_steps: int) -> None:
    matrix = with_values([5.0, 4.0, 1.0])
    it = begun(matrix, 0.0, max_steps)
    image = run(it, matrix)
    factor, side = it.ask()
    assert side == ("left" if it.steps % 2 else "right")
    assert factor.norm().item() == pytest.approx(it.sigmas[-2], rel=1e-14)
    left, right = (factor, image) if side == "left" else (image, factor)
    product = torch.outer(left, right) / it.sigmas[-2]
    missed = (matrix - product).norm().square().item()
    assert missed == pytest.approx(matrix.norm().square().item() - it.sigmas[-1] ** 2, rel=1e-12)
    assert it.converged == (max_steps == 1000)
    if it.converged:
        u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
        torch.testing.assert_close(product, s[0] * torch.outer(u[:, 0], vh[0]), rtol=0, atol=1e-7)
    else:
        assert it.steps == max_steps


@pytest.mark.parametrize("put_away", [copy.deepcopy, lambda it: decoded(encoded(it), None)])
@pytest.mark.parametrize("steps", [0, 1, 4])
def test_goes_on_where_it_was_put_away(put_away, steps: int) -> None:
    matrix = with_values([5.0, 4.5, 1.0])
    it = begun(matrix, 1e-9)
    for _ in range(steps):
        step(it, matrix)
    other = put_away(it)
    images = run(it, matrix), run(other, matrix)
    assert it.steps > 5
    assert torch.equal(*images)
    assert torch.equal(it.factor, other.factor)
    assert it.sigmas == other.sigmas
    assert (it.side, it.steps, it.converged) == (other.side, other.steps, other.converged)


def test_zero_is_done_at_once() -> None:
    matrix = torch.zeros(9, 16, dtype=torch.float64)
    it = begun(matrix, 1e-6)
    assert not run(it, matrix).any()
    assert (it.steps, it.sigmas, it.converged, it.norm) == (1, [0.0], True, 1.0)
