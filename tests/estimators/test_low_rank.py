"""KFOC(rank=r): the best sum of r Kronecker products, against the SVD of the rearranged F."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import kfoc
import oracle
from kfoc.estimators.sums import _pieces
from kfoc.nearest.pair import recompressed, symmetries
from kfoc.nearest.subspace import Matrix, Singular, coordinates, leading, matrices
from kfoc.samples.inputs import Rows
from kfoc.samples.linear import Samples
from models import Dead, batches, convolutional, images, trained


def best(fisher: Tensor, o: int, i: int, rank: int) -> tuple[Tensor, float]:
    """The closest sum of `rank` products (dense), and its relative error."""
    u, s, v = torch.linalg.svd(oracle.rearranged(fisher, o, i), full_matrices=False)
    truncated = (u[:, :rank] * s[:rank]) @ v[:rank]
    dense = truncated.view(o, o, i, i).permute(0, 2, 1, 3).reshape(o * i, o * i)
    return dense, (s[rank:].norm() / s.norm()).item()


def fisher_of(model: nn.Module, layer: str, x: Tensor) -> Tensor:
    return oracle.fisher_block(model, layer, x, oracle.categorical_exact(model(x).detach()))


@pytest.mark.parametrize("rank", [2, 3])
@pytest.mark.parametrize("buffer", [2**20, 50_000])
@pytest.mark.parametrize("size", [20, 7])
def test_what_is_at_hand_gets_its_optimum(rank: int, buffer: int, size: int) -> None:
    """As F itself (large buffer) or as the collected samples."""
    model, (x, y) = convolutional(), images(20)
    estimator = kfoc.KFOC(rank=rank, buffer=buffer, rtol=0)
    found = kfoc.fit(model, batches(x, y, size), fisher="exact", estimator=estimator)
    for layer, block in found.items():
        assert isinstance(block, kfoc.LowRankBlock)
        fisher = fisher_of(model, layer, x)
        expected, error = best(fisher, *block.shape, rank)
        assert block.report.converged
        torch.testing.assert_close(
            block.to_dense(), expected, rtol=1e-6, atol=1e-8 * expected.abs().max().item()
        )
        assert oracle.relative_error(fisher, block.to_dense()) == pytest.approx(error, abs=1e-8)
        torch.testing.assert_close(block.to_dense(), block.to_dense().mT, rtol=0, atol=1e-14)
        for factors in (block.lefts, block.rights):
            for factor in factors:
                assert torch.equal(factor, factor.mT) or torch.equal(factor, -factor.mT)
        first = kfoc.KroneckerBlock(block.lefts[0], block.rights[0])
        assert torch.linalg.eigvalsh(first.to_dense())[0] > -1e-10


@pytest.mark.parametrize("layer", ["0", "3", "5"])
@pytest.mark.parametrize("size", [3, 8])
def test_exact_aggregation_streams_to_the_optimum(layer: str, size: int) -> None:
    model, (x, y) = convolutional(), images(24)
    estimator = kfoc.KFOC("exact", rank=2, buffer=0, rtol=0, passes=300)
    found = kfoc.fit(model, batches(x, y, size), fisher="exact", estimator=estimator, layers=layer)
    block = found[layer]
    fisher = fisher_of(model, layer, x)
    expected, _ = best(fisher, *block.shape, 2)
    assert block.report.converged
    torch.testing.assert_close(
        block.to_dense(), expected, rtol=1e-6, atol=1e-8 * expected.abs().max().item()
    )


@pytest.mark.parametrize("rank", [2, 3])
@pytest.mark.parametrize(("size", "buffer"), [(5, 0), (30, 0), (1, 500), (100, 4000)])
def test_one_pass_comes_close(rank: int, size: int, buffer: int) -> None:
    model, x, y = trained(300, 2.0)
    exact = kfoc.fit(model, [(x, y)], fisher="empirical", estimator=kfoc.BlockDiagonal())
    estimator = kfoc.KFOC(rank=rank, buffer=buffer)
    found = kfoc.fit(model, batches(x, y, size), fisher="empirical", estimator=estimator)
    for layer, block in found.items():
        fisher = exact[layer].to_dense()
        _, error = best(fisher, *block.shape, rank)
        assert block.report.head == 2 * rank + 4
        assert oracle.relative_error(fisher, block.to_dense()) < error + 0.003


def test_antisymmetric_factors_are_found() -> None:
    """Where outputs see the positions turned, the second-best product is antisymmetric."""
    turn = torch.tensor([[0.0, 1.0], [-1.0, 0.0]])
    fisher = torch.kron(torch.eye(2), torch.eye(2)) * 2 + torch.kron(turn, turn)
    assert torch.linalg.eigvalsh(fisher)[0] >= 0
    found = leading(
        Matrix(oracle.rearranged(fisher, 2, 2), (2, 2)),
        2,
        3,
        rtol=0,
        max_steps=50,
        like=torch.zeros(()),
    )
    block = kfoc.LowRankBlock(*found.terms(2))
    torch.testing.assert_close(block.to_dense(), fisher)
    assert torch.equal(block.lefts[1], -block.lefts[1].mT)
    again = kfoc.LowRankBlock(*recompressed(block.lefts, block.rights, 2))
    torch.testing.assert_close(again.to_dense(), fisher)


@pytest.mark.parametrize("size", [1e-30, 1.0, 1e30])
def test_symmetry_is_told_through_rounding(size: float) -> None:
    """No sum is sure to round alike above the diagonal and below: that depends on the processor."""
    square = torch.randn(4, 3, 3, dtype=torch.float32) * size
    stack = torch.stack([square[0] + square[0].mT, square[1] - square[1].mT, 0 * square[2]])
    rounded = stack * (1 + 1e-6 * torch.randn(3, 3, 3, dtype=torch.float32))
    assert not torch.equal(rounded[1], -rounded[1].mT)
    for each in (stack, rounded):
        assert symmetries(each) == [1, -1, 1]
        sigmas = torch.tensor([3.0, 2.0, 1.0])
        assert _pieces(Singular(each, each, sigmas), 3).signs == [1, -1, 1]


def test_no_term_is_lost_where_factors_are_rounded() -> None:
    """Of terms of the same size, as an antisymmetric one is often of a symmetric one's."""
    one, other = torch.randn(2, 5, 5)
    pairs = [torch.linalg.qr(coordinates(one[None], sign))[0] for sign in (1, -1)]
    stack = torch.cat([matrices(q, 5, sign) for q, sign in zip(pairs, (1, -1), strict=True)])
    rounded = stack * (1 + 1e-15 * other)
    found = kfoc.LowRankBlock(*recompressed(rounded, stack, 2))
    expected = kfoc.LowRankBlock(stack, stack).to_dense()
    torch.testing.assert_close(found.to_dense(), expected)
    assert sorted(symmetries(found.lefts)) == [-1, 1]
    for factors in (found.lefts, found.rights):
        for factor, sign in zip(factors, symmetries(factors), strict=True):
            torch.testing.assert_close(factor, sign * factor.mT)


@pytest.mark.parametrize("sign", [1, -1])
def test_coordinates_are_orthonormal(sign: int) -> None:
    stack = torch.randn(3, 4, 4)
    part = (stack + sign * stack.mT) / 2
    columns = coordinates(stack, sign)
    torch.testing.assert_close(columns.norm(dim=0), part.flatten(1).norm(dim=1))
    torch.testing.assert_close(matrices(columns, 4, sign), part)


def streamed(estimator: kfoc.KFOC, parts: list[Samples]) -> kfoc.Block:
    """The block of a layer with these batches of samples, over as many passes as it asks for."""
    state = estimator.begin("layer", parts[0])
    for _ in range(estimator.pass_limit):
        for part in parts:
            state.add(part, alone=False)
        if state.next_pass():
            break
    return state.block(sum(part.num_samples for part in parts))


def dense_of(parts: list[Samples]) -> Tensor:
    rows = [
        torch.einsum("snto,nti->snoi", part.grads, part.inputs.rows(0, part.num_samples))
        for part in parts
    ]
    flat = torch.cat([gradient.flatten(0, 1).flatten(1) for gradient in rows])
    return flat.mT @ flat / sum(part.num_samples for part in parts)


def test_antisymmetric_factors_are_found_in_samples() -> None:
    turn = torch.tensor([[0.0, 1.0], [-1.0, 0.0]])
    covariance = 2 * torch.eye(4) + 1.9 * torch.kron(turn, turn)
    values = torch.linalg.cholesky(covariance) @ torch.randn(4, 60)
    gradients = values.mT.view(60, 2, 2)  # X = sum_t g_t a_t^T with a_t = e_t
    parts = [
        Samples(Rows(torch.eye(2).expand(len(part), 2, 2)), part.mT[None])
        for part in gradients.split(20)
    ]
    fisher = dense_of(parts)
    torch.testing.assert_close(fisher, values @ values.mT / 60)
    for estimator in (
        kfoc.KFOC("exact", rank=2, buffer=0, rtol=0, passes=200),
        kfoc.KFOC(rank=2, buffer=0),  # what is kept holds all directions there are
        kfoc.KFOC(rank=2),
    ):
        block = streamed(estimator, parts)
        assert isinstance(block, kfoc.LowRankBlock)
        assert torch.equal(block.lefts[1], -block.lefts[1].mT)
        torch.testing.assert_close(block.to_dense(), best(fisher, 2, 2, 2)[0])


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("aggregation", ["online", "exact"])
@pytest.mark.parametrize("buffer", [0, 130, 10_000])
def test_batches_of_different_scales_and_positions(
    buffer: int, aggregation: str, order: int
) -> None:
    """Sums change their unit on the way, whether batches come streaming, held back, or as F."""
    parts = [
        Samples(Rows(scale * torch.randn(3, t, 4)), torch.randn(1, 3, t, 3))
        for scale, t in ((1e-3, 2), (1.0, 1), (300.0, 2))
    ][::order]
    fisher = dense_of(parts)
    estimator = kfoc.KFOC(aggregation, rank=3, buffer=buffer, rtol=0, passes=300)
    block = streamed(estimator, parts)  # so small that "online" drops nothing
    expected, _ = best(fisher, 3, 4, 3)
    assert block.report.converged
    assert oracle.relative_error(expected, block.to_dense()) < 1e-7


def test_groups_and_more_products_than_there_are() -> None:
    model = nn.Sequential(nn.Conv1d(4, 4, 2, groups=2), nn.Flatten(), nn.Linear(16, 1))
    x = torch.randn(6, 4, 5)
    estimator = kfoc.KFOC(rank=4, rtol=0)
    options: dict = {"likelihood": "gaussian", "fisher": "exact"}
    found = kfoc.fit(model, [(x, None)], estimator=estimator, **options)
    exact = kfoc.fit(model, [(x, None)], estimator=kfoc.BlockDiagonal(), **options)
    # The head's left factor is a number, so one product is all there is; zeros make up the rest.
    torch.testing.assert_close(found["2"].to_dense(), exact["2"].to_dense())
    group = found["0"]
    assert isinstance(group, kfoc.GroupedBlock)
    for k, one in enumerate(group.blocks):
        part = exact["0"].to_dense()[k * 10 : (k + 1) * 10, k * 10 : (k + 1) * 10]
        expected, _ = best(part, 2, 5, 4)
        torch.testing.assert_close(one.to_dense(), expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("buffer", [0, 2**20])
@pytest.mark.parametrize("scale", [1e-20, 1e15])
def test_extreme_scales_in_float32(scale: float, buffer: int) -> None:
    """The factors scale with the gradients, to rounding, where F itself would leave float32."""
    model, (x, y) = convolutional(torch.float32), images(12, torch.float32)
    estimator = kfoc.KFOC(rank=2, buffer=buffer)
    options: dict = {"fisher": "exact", "layers": ["0", "3"], "estimator": estimator}
    plain = kfoc.fit(model, batches(x, y, 5), "gaussian", **options)
    with torch.no_grad():
        model[5].weight.mul_(scale)
    found = kfoc.fit(model, batches(x, y, 5), "gaussian", **options)
    for layer, block in found.items():
        expected = plain[layer].to_dense().double()
        rescaled = kfoc.LowRankBlock(block.lefts.double() / scale, block.rights.double() / scale)
        error = (rescaled.to_dense() - expected).norm() / expected.norm()
        assert error < 1e-3


def test_dead_layers_have_zero_blocks() -> None:
    for buffer in (0, 2**20):
        data = [(torch.randn(5, 4), None)] * 3
        found = kfoc.fit(Dead(), data, "gaussian", estimator=kfoc.KFOC(rank=2, buffer=buffer))
        assert not found["dead"].to_dense().any()
        assert found["used"].to_dense().any()


def test_probes_certify() -> None:
    model, x, y = trained(100)
    exact = kfoc.fit(model, [(x, y)], estimator=kfoc.BlockDiagonal())
    found = kfoc.fit(model, [(x, y)], estimator=kfoc.KFOC(rank=2), probes=200)
    for layer, block in found.items():
        error = oracle.relative_error(exact[layer].to_dense(), block.to_dense())
        assert block.relative_error == pytest.approx(error, abs=4 * block.report.standard_error)


def test_refuses_what_does_not_go_together() -> None:
    with pytest.raises(ValueError, match="rank must be at least 1, found 0"):
        kfoc.KFOC(rank=0).check()
    for bad in (
        kfoc.KFOC("running", rank=2),
        kfoc.KFOC("approx", rank=2),
        kfoc.KFOC(plan="gram", rank=2),
    ):
        with pytest.raises(ValueError, match='rank=2 goes with aggregation="online" or "exact"'):
            bad.check()
