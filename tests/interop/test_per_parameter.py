"""Weights without their biases: the estimator against the dense reference, the block as such."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import kfoc
import oracle
from curvatures import block, curvature, flat, power, psd, vector
from kfoc.interop.per_parameter import SplitBlock, per_parameter
from models import batches, convolutional, images


def split_block(o: int = 4, i: int = 3) -> SplitBlock:
    weight = kfoc.KroneckerBlock(psd(o), psd(i - 1))
    return SplitBlock((weight, kfoc.DenseBlock(psd(o), (o, 1))))


def parts(dense: Tensor, o: int, i: int) -> tuple[Tensor, Tensor]:
    """F of the weight alone and of the bias alone."""
    matrix = dense.view(o, i, o, i)
    return matrix[:, :-1, :, :-1].reshape(o * (i - 1), -1), matrix[:, -1, :, -1]


def test_closest_product_of_the_weight_and_exact_block_of_the_bias() -> None:
    model = convolutional()
    inputs, labels = images(20)
    cotangents = oracle.categorical_exact(model(inputs).detach())
    estimator = per_parameter(model, kfoc.KFOC("exact", rtol=1e-12, passes=100, buffer=1))
    data = batches(inputs, labels, 10)
    found = kfoc.fit(model, data, fisher="exact", estimator=estimator, probes=200)
    assert estimator.biased == {"0", "3", "5"}
    for layer, each in found.items():
        o, i = each.shape
        fisher = oracle.fisher_block(model, layer, inputs, cotangents)
        weight, bias = parts(fisher, o, i)
        best, _, _ = oracle.optimum(weight, o, i - 1)
        assert oracle.relative_error(best, each.weight.to_dense()) < 1e-5
        torch.testing.assert_close(each.bias.to_dense(), bias)
        approximation = each.to_dense()
        torch.testing.assert_close(parts(approximation, o, i)[0], each.weight.to_dense())
        error = oracle.relative_error(fisher, approximation)
        assert abs(each.relative_error - error) < 4 * each.report.standard_error + 1e-3


def test_layers_without_a_bias_and_normalisation_keep_the_bases_blocks() -> None:
    model = nn.Sequential(
        nn.Linear(4, 6, bias=False), nn.LayerNorm(6), nn.Conv1d(1, 2, 2), nn.Flatten()
    )
    model.insert(2, nn.Unflatten(1, (1, 6)))
    data = [(torch.randn(8, 4), torch.randint(10, (8,)))]
    base = kfoc.fit(model, data)
    found = kfoc.fit(model, data, estimator=per_parameter(model))
    assert isinstance(found["3"], SplitBlock)
    for layer in ("0", "1"):
        torch.testing.assert_close(found[layer].to_dense(), base[layer].to_dense())


def test_the_block_is_its_dense_matrix() -> None:
    each = split_block()
    o, i = each.shape
    dense = each.to_dense()
    vectors = torch.randn(2, o, i)
    torch.testing.assert_close(each.matvec(vectors).flatten(1), vectors.flatten(1) @ dense)
    assert each.trace() == pytest.approx(dense.trace().item())
    torch.testing.assert_close(each.scaled(3.0).to_dense(), 3 * dense)
    assert each.frobenius_norm() == pytest.approx(dense.norm().item())
    for other in (block("KroneckerBlock"), block("DenseBlock"), block("EigenBlock"), split_block()):
        expected = (dense * other.to_dense()).sum().item()
        assert each.inner(other) == pytest.approx(expected)
        assert other.inner(each) == pytest.approx(expected)
    left, right = torch.randn(o, 2), torch.randn(i, 5)
    for a, b in ((left, right), (None, right), (left, None), (None, None)):
        basis = torch.kron(torch.eye(o) if a is None else a, torch.eye(i) if b is None else b)
        expected = (basis * (dense @ basis)).sum(0)
        torch.testing.assert_close(each.diagonal_in(a, b).flatten(), expected)
    diagonal = torch.rand(i)
    expected = (dense * torch.kron(left @ left.mT, torch.diag(diagonal))).sum()
    torch.testing.assert_close(each.inner_kronecker(left @ left.mT, diagonal), expected)


def test_solves_and_samples() -> None:
    found = curvature(split_block())
    damped = found.damped(0.2).redamped(0.1, scale=2.0)
    matrix = 2 * found["0"].to_dense() + 0.1 * torch.eye(12)
    vectors = vector(found, 3)
    solved = flat(found, damped.solve(vectors))
    torch.testing.assert_close(solved, flat(found, vectors) @ power(matrix, -1))
    assert damped.logdet() == pytest.approx(torch.logdet(matrix).item())
    noise = torch.randn(1, 4, 3, generator=torch.Generator().manual_seed(0))
    draws = flat(found, damped.sample(seed=0))
    torch.testing.assert_close(draws, noise.flatten(1) @ power(matrix, -0.5))


def test_base_must_be_an_estimator() -> None:
    model = convolutional()
    with pytest.raises(ValueError, match="base must be an estimator"):
        kfoc.fit(model, batches(*images(4), 4), estimator=per_parameter(model, kfoc.KFOC))
