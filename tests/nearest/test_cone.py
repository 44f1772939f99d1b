"""The projection onto the positive semi-definite cone, against dense algebra."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from head_and_tail import on_the_cone as expected
from kfoc.nearest import cone
from kfoc.nearest.cone import on_the_cone

SIZE = 64  # an eighth of it: 8


def with_eigenvalues(values: Tensor) -> Tensor:
    vectors = torch.linalg.qr(torch.randn(SIZE, SIZE))[0][:, : len(values)]
    matrix = (vectors * values) @ vectors.mT
    return (matrix + matrix.mT) / 2


INDEFINITE = {
    "of few samples": torch.tensor([3.0, 1.0, 0.1, 1e-4, -0.02, -1e-6]),
    "of a spectrum that falls": 10.0 ** -torch.arange(0.0, 50.0, 3) * (-1.0) ** torch.arange(17),
    "negative": -torch.linspace(0.1, 1, 5),
    "of full rank": torch.linspace(1.0, -0.05, SIZE),
    "of full rank but for little": torch.cat([torch.tensor([5.0, -1.0]), 1e-9 * torch.ones(62)]),
}


@pytest.mark.parametrize("large", [16, 1024])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", INDEFINITE)
def test_the_closest_matrix_on_the_cone(
    name: str, dtype: torch.dtype, large: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cone, "LARGE", large)
    factor = with_eigenvalues(INDEFINITE[name].double()).to(dtype)
    before = factor.clone()
    found = on_the_cone(factor)
    assert found.dtype == dtype
    assert torch.equal(factor, before)
    assert torch.equal(found, found.mT)
    precision = SIZE * torch.finfo(dtype).eps
    values = torch.linalg.eigvalsh(found.double())
    assert values[0] >= -precision * max(values[-1].item(), 1e-30)
    error = (found.double() - expected(factor.double())).norm()
    assert error <= 2 * precision * factor.norm()


@pytest.mark.parametrize(("rank", "few"), [(5, True), (8, True), (20, False), (SIZE, False)])
def test_what_few_columns_span_is_decomposed_in_them(rank: int, few: bool) -> None:
    factor = with_eigenvalues(torch.linspace(1, -0.5, rank))
    basis, within = cone._compressed(factor)
    assert (basis is not None) == few
    if basis is None:
        assert within is factor
    else:
        assert within.shape == (8, 8)
        torch.testing.assert_close(basis @ within @ basis.mT, factor)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_is_positive_up_to_rounding_is_returned_as_it_is(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cone, "LARGE", 16)
    rows = torch.randn(5, SIZE)
    singular = rows.mT @ rows
    rounded = singular - 8 * torch.finfo(dtype).eps * singular.diagonal().max() * torch.eye(SIZE)
    for factor in (torch.eye(SIZE), singular, rounded, torch.zeros(SIZE, SIZE)):
        kept = factor.to(dtype)
        assert on_the_cone(kept) is kept
    assert on_the_cone(torch.tensor([1.0, -1e-3, 0.0])).tolist() == [1.0, 0.0, 0.0]
