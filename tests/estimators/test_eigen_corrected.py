"""EigenCorrected: the best diagonal in a fixed Kronecker eigenbasis, against the dense one."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import kfoc
import oracle
from kfoc.estimators.base import State
from kfoc.samples.linear import Samples
from models import Dead, batches, convolutional, images, trained

BASES = {
    "kfac": kfoc.KFAC(),
    "kfoc": kfoc.KFOC(),
    "kfoc-streamed": kfoc.KFOC(buffer=0),
    "kfoc-exact": kfoc.KFOC("exact", buffer=0, passes=5),
}


def best_diagonal(fisher: Tensor, base: kfoc.Block) -> Tensor:
    """The closest block to F with the eigenvectors of the base's factors, dense."""
    assert isinstance(base, kfoc.KroneckerBlock)
    basis = torch.kron(torch.linalg.eigh(base.left)[1], torch.linalg.eigh(base.right)[1])
    return basis @ torch.diag((basis.mT @ fisher @ basis).diagonal()) @ basis.mT


@pytest.mark.parametrize("size", [20, 6])
@pytest.mark.parametrize("name", BASES)
def test_is_the_best_diagonal_in_the_bases_eigenbasis(name: str, size: int) -> None:
    model, (x, y) = convolutional(), images(20)
    base, data = BASES[name], batches(x, y, size)
    options: dict = {"fisher": "exact", "layers": ["3", "5"] if size == 6 else None}
    bases = kfoc.fit(model, data, estimator=base, **options)
    found = kfoc.fit(model, data, estimator=kfoc.EigenCorrected(base), **options)
    for layer, block in found.items():
        assert isinstance(block, kfoc.EigenBlock)
        cotangents = oracle.categorical_exact(model(x).detach())
        fisher = oracle.fisher_block(model, layer, x, cotangents)
        expected = best_diagonal(fisher, bases[layer])
        torch.testing.assert_close(
            block.to_dense(), expected, rtol=1e-8, atol=1e-10 * fisher.abs().max().item()
        )
        error = oracle.relative_error(fisher, block.to_dense())
        assert error <= oracle.relative_error(fisher, bases[layer].to_dense()) + 1e-12
        assert block.report.steps == bases[layer].report.steps
        assert block.report.converged == bases[layer].report.converged


def test_convolutions_over_several_batches() -> None:
    model, (x, y) = convolutional(), images(20)
    found = kfoc.fit(model, batches(x, y, 3), fisher="exact", estimator=kfoc.EigenCorrected())
    block = found["0"]
    base = kfoc.fit(model, batches(x, y, 3), fisher="exact", estimator=kfoc.KFOC())["0"]
    cotangents = oracle.categorical_exact(model(x).detach())
    fisher = oracle.fisher_block(model, "0", x, cotangents)
    torch.testing.assert_close(block.to_dense(), best_diagonal(fisher, base))


class Mixed(nn.Module):
    """A grouped convolution, a normalisation layer and a linear one."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 6, 3, groups=2)
        self.norm = nn.GroupNorm(2, 6)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.norm(self.conv(x))).mean((2, 3)))


def test_groups_and_normalisation_layers() -> None:
    model, x = Mixed(), torch.randn(9, 4, 5, 5)
    data = [(part, None) for part in x.split(4)]
    options: dict = {"likelihood": "gaussian", "fisher": "exact"}
    base = kfoc.fit(model, data, estimator=kfoc.KFOC(), **options)
    found = kfoc.fit(model, data, estimator=kfoc.EigenCorrected(), **options)
    fisher = oracle.fisher_block(model, "conv", x, oracle.gaussian_exact(model(x).detach()))
    group = found["conv"]
    assert isinstance(group, kfoc.GroupedBlock)
    for k, (one, under) in enumerate(zip(group.blocks, base["conv"].blocks, strict=True)):
        size = one.shape[0] * one.shape[1]
        part = fisher[k * size : (k + 1) * size, k * size : (k + 1) * size]
        torch.testing.assert_close(one.to_dense(), best_diagonal(part, under))
    assert isinstance(found["norm"], kfoc.DenseBlock)
    assert torch.equal(found["norm"].matrix, base["norm"].matrix)
    v = {name: torch.randn(2, *p.shape) for name, p in model.named_parameters()}
    assert all(t.isfinite().all() for t in found.solve(v).values())


def test_groups_that_settle_in_different_passes() -> None:
    """A settled group does not take in the passes that another one still needs."""
    model = nn.Sequential(nn.Conv1d(4, 6, 2, groups=2), nn.Flatten(), nn.Linear(24, 3))
    x = torch.randn(12, 4, 5)
    x[:, 2:] = x[:1, 2:]  # the second group always sees the same input: it settles at once
    data = [(part, None) for part in x.split(4)]
    estimator = kfoc.KFOC("exact", buffer=0, rtol=1e-10, passes=60)
    options: dict = {"likelihood": "gaussian", "fisher": "exact", "layers": "0"}
    block = kfoc.fit(model, data, estimator=estimator, **options)["0"]
    assert isinstance(block, kfoc.GroupedBlock)
    steps = [one.report.steps for one in block.blocks]
    assert steps[0] != steps[1]
    fisher = oracle.fisher_block(model, "0", x, oracle.gaussian_exact(model(x).detach()))
    for k, one in enumerate(block.blocks):
        part = fisher[k * 15 : (k + 1) * 15, k * 15 : (k + 1) * 15]
        _best, _, error = oracle.optimum(part, 3, 5)
        assert oracle.relative_error(part, one.to_dense()) == pytest.approx(error, rel=1e-6)
    # One more pass is a factor in the sums of these, where K-FOC's norms would hide it.
    corrected = kfoc.fit(model, data, estimator=kfoc.EigenCorrected(estimator), **options)["0"]
    assert isinstance(corrected, kfoc.GroupedBlock)
    for k, one in enumerate(corrected.blocks):
        part = fisher[k * 15 : (k + 1) * 15, k * 15 : (k + 1) * 15]
        assert one.trace() == pytest.approx(part.trace().item())


def test_probes_compare_the_four() -> None:
    """The documented way to see which estimator is the closest for a layer."""
    model, x, y = trained(200)
    data = batches(x, y, 50)
    estimators = {
        "K-FAC": kfoc.KFAC(),
        "K-FOC": kfoc.KFOC(),
        "EKFAC": kfoc.EigenCorrected(kfoc.KFAC()),
        "EK-FOC": kfoc.EigenCorrected(kfoc.KFOC()),
    }
    fits = {name: kfoc.fit(model, data, estimator=e, probes=200) for name, e in estimators.items()}
    exact = kfoc.fit(model, data, estimator=kfoc.BlockDiagonal())
    for layer, block in exact.items():
        for _name, found in fits.items():
            error = oracle.relative_error(block.to_dense(), found[layer].to_dense())
            deviation = found[layer].relative_error_standard_error
            assert found[layer].relative_error == pytest.approx(error, abs=4 * deviation + 1e-6)
        for base, corrected in (("K-FAC", "EKFAC"), ("K-FOC", "EK-FOC")):
            assert fits[corrected][layer].relative_error <= fits[base][layer].relative_error


def test_refuses_bases_without_an_eigenbasis() -> None:
    data = [(torch.randn(4, 3), None)]
    for base in (kfoc.Diagonal(), kfoc.KFOC, kfoc.EigenCorrected(), None):
        with pytest.raises(ValueError, match="base must be a Kronecker-factored estimator"):
            kfoc.fit(nn.Linear(3, 2), data, "gaussian", estimator=kfoc.EigenCorrected(base))
    with pytest.raises(ValueError, match="base must have rank 1"):
        kfoc.fit(
            nn.Linear(3, 2), data, "gaussian", estimator=kfoc.EigenCorrected(kfoc.KFOC(rank=2))
        )
    with pytest.raises(ValueError, match="aggregation must be one of"):
        kfoc.EigenCorrected(kfoc.KFOC("of")).check()
    with pytest.raises(ValueError, match="several passes"):
        kfoc.fit(nn.Linear(3, 2), iter(data), "gaussian", estimator=kfoc.EigenCorrected())


class WithDiagonals(kfoc.KFAC):
    """Gives what has no eigenbasis on the right, as estimators do for large embeddings."""

    def begin_one(self, layer: str, samples: Samples) -> State:
        state = super().begin_one(layer, samples)
        whole = state.block

        def block(num_samples: float) -> kfoc.KroneckerDiagonalBlock:
            found = whole(num_samples)
            assert isinstance(found, kfoc.KroneckerBlock)
            return kfoc.KroneckerDiagonalBlock(found.left, found.right.diagonal())

        object.__setattr__(state, "block", block)
        return state


def test_blocks_without_two_eigenbases_are_kept() -> None:
    model, data = nn.Linear(3, 2), [(torch.randn(4, 3), None)] * 2
    base = kfoc.fit(model, data, "gaussian", estimator=WithDiagonals())[""]
    found = kfoc.fit(model, data, "gaussian", estimator=kfoc.EigenCorrected(WithDiagonals()))[""]
    assert isinstance(found, kfoc.KroneckerDiagonalBlock)
    assert torch.equal(found.to_dense(), base.to_dense())


def test_dead_layers() -> None:
    data = [(torch.randn(5, 4), None)] * 2
    found = kfoc.fit(Dead(), data, "gaussian", estimator=kfoc.EigenCorrected())
    assert not found["dead"].to_dense().any()
    assert found["used"].to_dense().any()
