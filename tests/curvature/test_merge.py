"""The sum of two curvatures."""

from __future__ import annotations

import pytest
import torch

import kfoc
import oracle
from curvatures import block, curvature, dense, low_rank, psd


@pytest.mark.parametrize("kind", ["DiagonalBlock", "DenseBlock"])
def test_exact_kinds(kind: str) -> None:
    a, b = curvature(block(kind), num_samples=10), curvature(block(kind), num_samples=30)
    total = a + b
    torch.testing.assert_close(dense(total), (dense(a) + 3 * dense(b)) / 4)
    assert total.num_samples == 40
    assert total.skipped == {"9": "a reason"}
    assert (total.estimator, total.fisher, total.seed) == ("KFOC()", "mc", 7)
    assert total["0"].relative_error is None
    other = kfoc.Curvature(b.blocks, 30, b.layouts, {"8": "x"}, "KFAC()", "exact", 8)
    mixed = a + other
    assert mixed.skipped == {"9": "a reason", "8": "x"}
    assert (mixed.estimator, mixed.fisher, mixed.seed) == ("", "", None)


def test_kronecker_products_merge_to_the_closest() -> None:
    a = curvature(block("KroneckerBlock"), block("GroupedBlock"), num_samples=10)
    b = curvature(block("KroneckerBlock"), block("GroupedBlock"), num_samples=30)
    total = a + b
    expected = (a["0"].to_dense() + 3 * b["0"].to_dense()) / 4
    torch.testing.assert_close(total["0"].to_dense(), oracle.optimum(expected, 4, 3)[0])
    expected = (a["1"].to_dense() + 3 * b["1"].to_dense()) / 4
    for part in (slice(0, 6), slice(6, 12)):
        best = oracle.optimum(expected[part, part], 2, 3)[0]
        torch.testing.assert_close(total["1"].to_dense()[part, part], best)


def test_products_with_diagonals() -> None:
    a = curvature(block("KroneckerDiagonalBlock"))
    b = curvature(block("KroneckerDiagonalBlock"))
    total = (a + b)["0"]
    assert isinstance(total, kfoc.KroneckerDiagonalBlock)
    expected = (dense(a) + dense(b)) / 2
    torch.testing.assert_close(total.to_dense(), oracle.optimum(expected, 4, 3)[0])


def test_sums_of_products_merge_to_the_closest_of_the_rank() -> None:
    a, b = curvature(low_rank(4, 3), num_samples=10), curvature(low_rank(4, 3), num_samples=30)
    total = (a + b)["0"]
    assert isinstance(total, kfoc.LowRankBlock)
    assert total.rank == 3
    u, s, v = torch.linalg.svd(oracle.rearranged((dense(a) + 3 * dense(b)) / 4, 4, 3))
    best = oracle.rearranged(torch.zeros(12, 12), 4, 3) + (u[:, :3] * s[:3]) @ v[:3]
    torch.testing.assert_close(oracle.rearranged(total.to_dense(), 4, 3), best)
    torch.testing.assert_close(total.to_dense(), total.to_dense().mT)


def test_eigen_blocks_need_the_same_basis() -> None:
    first = block("EigenBlock")
    second = kfoc.EigenBlock(first.left_vectors, first.right_vectors, torch.rand(4, 3))
    a, b = curvature(first), curvature(second)
    torch.testing.assert_close(dense(a + b), (dense(a) + dense(b)) / 2)
    with pytest.raises(ValueError, match=r"layer '0': .*different eigenbases"):
        a + curvature(block("EigenBlock"))


def test_what_does_not_add_up() -> None:
    a = curvature(block("KroneckerBlock"))
    with pytest.raises(ValueError, match="a KroneckerBlock 4 x 3 and a DiagonalBlock 4 x 3"):
        a + curvature(block("DiagonalBlock"))
    with pytest.raises(ValueError, match=r"not about the same parameters; they differ in \['1'\]"):
        a + curvature(block("KroneckerBlock"), block("DiagonalBlock"))
    with pytest.raises(ValueError, match=r"they differ in \['0'\]"):
        a.compare(curvature(block("KroneckerBlock", 2, 3)))
    with pytest.raises(ValueError, match="neither curvature has any samples"):
        curvature(block("DiagonalBlock"), num_samples=0) + curvature(
            block("DiagonalBlock"), num_samples=0
        )
    with pytest.raises(TypeError):
        a + 1
    first = kfoc.GroupedBlock(tuple(kfoc.DiagonalBlock(torch.rand(n, 3)) for n in (1, 3)))
    with pytest.raises(ValueError, match=r"the groups differ: \[1, 3\] and \[2, 2\]"):
        curvature(first) + curvature(block("GroupedBlock"))
    with pytest.raises(ValueError, match="the groups differ"):
        curvature(first).compare(curvature(block("GroupedBlock")))


def test_adding_fits_is_fitting_the_union() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Tanh(), torch.nn.Linear(3, 2))
    x = torch.randn(30, 4)
    options: dict = {"likelihood": "gaussian", "fisher": "exact", "estimator": kfoc.BlockDiagonal()}
    parts = [kfoc.fit(model, [(rows, None)], **options) for rows in x.split([10, 20])]
    whole = kfoc.fit(model, [(x, None)], **options)
    torch.testing.assert_close(dense(parts[0] + parts[1]), dense(whole))
    merged = [kfoc.fit(model, [(rows, None)], "gaussian", fisher="exact") for rows in x.split(15)]
    total = merged[0] + merged[1]
    for layer in total:
        expected = (merged[0][layer].to_dense() + merged[1][layer].to_dense()) / 2
        best = oracle.optimum(expected, *total[layer].shape)[0]
        torch.testing.assert_close(total[layer].to_dense(), best)


def test_psd_factors_stay_psd() -> None:
    a = curvature(kfoc.KroneckerBlock(psd(4, 1), psd(3, 1)))
    b = curvature(kfoc.KroneckerBlock(psd(4, 1), psd(3, 1)))
    total = (a + b)["0"]
    oracle.assert_psd_and_symmetric(total.left)
    oracle.assert_psd_and_symmetric(total.right)
