"""The one-pass certificate against the dense error, for every estimator."""

import math
import sys
from itertools import product
from typing import Any

import pytest
import torch
from torch import nn

import kfoc
import oracle
from kfoc.estimators.certificate import Probes, _unbiased_error
from kfoc.samples.inputs import Rows
from kfoc.samples.linear import Samples
from kfoc.samples.one_hot import OneHot
from models import batches, convolutional, images, trained
from test_estimators import ESTIMATORS


@pytest.mark.parametrize("name", ESTIMATORS)
def test_probes_estimate_the_error_within_their_standard_error(name: str) -> None:
    model, x, y = trained(120)
    data = batches(x, y, 50)
    exact = kfoc.fit(model, data, estimator=kfoc.BlockDiagonal())
    curvature = kfoc.fit(model, data, estimator=ESTIMATORS[name], probes=200)
    for layer, block in curvature.items():
        error = oracle.relative_error(exact[layer].to_dense(), block.to_dense())
        deviation = block.relative_error_standard_error
        assert deviation is not None
        assert block.relative_error == pytest.approx(error, abs=4 * deviation + 1e-6)
        assert deviation <= 0.1


def test_standard_error_is_the_spread_over_seeds() -> None:
    model, x, y = trained(120)
    data = batches(x, y, 50)
    fits = [
        kfoc.fit(model, data, fisher="empirical", estimator=kfoc.KFAC(), probes=16, seed=seed)
        for seed in range(40)
    ]
    for layer in fits[0]:
        errors = torch.tensor([c[layer].relative_error for c in fits])
        claimed = torch.tensor([c[layer].relative_error_standard_error for c in fits])
        assert 0.4 < (claimed.mean() / errors.std()).item() < 2.5


def test_norms_are_unbiased() -> None:
    inputs, grads = torch.randn(10, 2, 3), torch.randn(1, 10, 2, 2)
    rows = torch.einsum("snto,nti->snoi", grads, inputs).reshape(10, 6)
    fisher = rows.mT @ rows / 10
    probes = Probes(4000, 0, "layer", Samples(Rows(inputs), grads))
    probes.add(Samples(Rows(inputs), grads))
    products = probes.products.flatten(1) * probes.unit / 10
    torch.testing.assert_close(products, probes.vectors.flatten(1) @ fisher)
    assert products.square().sum(1).mean().item() == pytest.approx(
        fisher.square().sum().item(), rel=0.1
    )


def test_probes_take_positions_and_several_directions() -> None:
    model, (x, y) = convolutional(), images(20)
    exact = kfoc.fit(model, batches(x, y, 7), fisher="exact", estimator=kfoc.BlockDiagonal())
    found = kfoc.fit(model, batches(x, y, 7), fisher="exact", estimator=kfoc.KFAC(), probes=300)
    for layer in found:
        error = oracle.relative_error(exact[layer].to_dense(), found[layer].to_dense())
        deviation = found[layer].relative_error_standard_error
        assert deviation is not None
        assert found[layer].relative_error == pytest.approx(error, abs=4 * deviation)


def noisy() -> tuple[nn.Sequential, torch.Tensor, dict[str, torch.Tensor]]:
    """A model, few samples, whose one draw a label leaves much noise, and the Fisher itself."""
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3))
    x = torch.randn(24, 5)
    cotangents = oracle.categorical_exact(model(x).detach())
    return model, x, {n: oracle.fisher_block(model, n, x, cotangents) for n in ("0", "2")}


def certified(seeds: int, estimator: kfoc.Estimator, **options: Any) -> dict[str, torch.Tensor]:
    """Layer -> by seed: fisher_error, its standard error, the true one and relative_error."""
    model, x, fishers = noisy()
    data, rows = [(part, None) for part in x.split(10)], {name: list[Any]() for name in fishers}
    for seed in range(seeds):
        more = {"estimator": estimator, "seed": seed, "verify": False, **options}
        for name, block in kfoc.fit(model, data, **more).items():
            true = oracle.relative_error(fishers[name], block.to_dense())
            found = block.fisher_error, block.fisher_error_std, true, block.relative_error
            rows[name].append(found)
    return {name: torch.tensor(each) for name, each in rows.items()}


@pytest.mark.parametrize(
    ("estimator", "keys"),
    [
        *[(each, None) for each in (kfoc.KFAC(), kfoc.KFOC(), kfoc.Diagonal())],
        (kfoc.EigenCorrected(kfoc.KFAC()), None),
        (kfoc.KFAC(), (5, 5)),
        (kfoc.BlockDiagonal(), (0, 0)),
        (kfoc.KFOC(), (0, 5)),
    ],
)
def test_squares_are_unbiased_over_draws_that_are_independent(
    estimator: kfoc.Estimator, keys: tuple[int, int] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And are not where they are one another's, both are the block's own, or one is."""
    model, x, fishers = noisy()
    off: dict[int, list[float]] = {6: [], 3: []}
    if keys is not None:
        monkeypatch.setattr(sys.modules["kfoc.fitting.session"], "UNSEEN", keys)

    def error(mean: torch.Tensor, half: torch.Tensor, approximate: torch.Tensor) -> Any:
        squares = (mean - approximate).square() - half.square()
        off[len(mean[0])].append(squares.flatten(1).sum(1).mean().item())
        return 0.0, 0.0

    monkeypatch.setattr("kfoc.estimators.certificate._unbiased_error", error)
    for seed in range(100):
        data = [(part, None) for part in x.split(10)]
        options: dict[str, Any] = {"seed": seed, "verify": False, "probes": 8}
        for name, block in kfoc.fit(model, data, estimator=estimator, **options).items():
            off[block.shape[0]][-1] -= (fishers[name] - block.to_dense()).square().sum().item()
    for values in map(torch.tensor, off.values()):
        deviations = abs(values.mean() / values.std()).item() * len(values) ** 0.5
        assert (deviations < 3) == (keys is None)


@pytest.mark.parametrize("estimator", [kfoc.KFAC(), kfoc.KFOC(), kfoc.BlockDiagonal()], ids=repr)
def test_the_error_against_the_fisher_itself(estimator: kfoc.Estimator) -> None:
    for rows in certified(40, estimator, probes=16).values():
        found, claimed, true, drawn = rows.unbind(1)
        off = (found - true).square().mean().sqrt()
        assert 0.6 < (claimed.square().mean().sqrt() / off).item() < 1.5
        assert (found - true).mean().abs() < 0.5 * off
        assert not isinstance(estimator, kfoc.BlockDiagonal) or drawn.max() < 1e-9 < true.min()


def test_the_standard_error_is_of_the_draws_too() -> None:
    """With so many probes, draws are all that is left of it."""
    for rows in certified(40, kfoc.BlockDiagonal(), probes=900).values():
        found, claimed, true, _ = rows.unbind(1)
        off = (found - true).square().mean().sqrt()
        assert 0.6 < (claimed.square().mean().sqrt() / off).item() < 1.5


@pytest.mark.parametrize("fisher", ["exact", "empirical"])
def test_without_draws_the_two_errors_are_one(fisher: str) -> None:
    model, data = convolutional(), batches(*images(20), 7)
    for options in ({"probes": 3}, {"layers": ["5"], "estimator": kfoc.KFOC(buffer=0)}):
        for block in kfoc.fit(model, data, fisher=fisher, **options).values():
            assert block.fisher_error == block.relative_error
            assert block.fisher_error_std == block.relative_error_standard_error


def test_blocks_do_not_see_the_draws_of_their_probes() -> None:
    model, data = convolutional(), batches(*images(20), 7)
    for estimator in ESTIMATORS.values():
        blind = kfoc.fit(model, data, estimator=estimator, mc_samples=2)
        found = kfoc.fit(model, data, estimator=estimator, mc_samples=2, probes=3)
        for name, block in found.items():
            assert torch.equal(block.to_dense(), blind[name].to_dense())
            assert block.fisher_error is not None
            assert blind[name].fisher_error is None


def test_neither_batches_nor_passes_change_what_is_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    model, (x, y) = convolutional(), images(20)
    seen: list[torch.Tensor] = []

    def error(mean: torch.Tensor, half: torch.Tensor, approximate: torch.Tensor) -> Any:
        seen.append(torch.stack([mean, half]))
        return 0.0, 0.0

    monkeypatch.setattr("kfoc.estimators.certificate._unbiased_error", error)
    for size, estimator in product((20, 7, 1), (kfoc.KFAC(), kfoc.EigenCorrected(kfoc.KFAC()))):
        kfoc.fit(model, batches(x, y, size), estimator=estimator, probes=9)
    assert len(seen) == 6 * 3
    for number, each in enumerate(seen):
        torch.testing.assert_close(each, seen[number % 3])


@pytest.mark.parametrize("inputs", ["rows", "tokens"])
def test_the_two_draws_change_places_by_groups(
    inputs: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for small in (
        "estimators.certificate.CHUNK",
        "estimators.tokens.CHUNK",
        "samples.one_hot.FULL_VOCABULARY",
    ):
        monkeypatch.setattr(f"kfoc.{small}", 5)
    tokens = OneHot(torch.randint(6, (9, 2)), 6, torch.float64)
    kind = tokens if inputs == "tokens" else Rows(torch.randn(9, 2, 6))
    samples = Samples(kind, torch.randn(2, 9, 2, 3))
    assert samples.diagonal == (inputs == "tokens")
    probes = Probes(9, 0, "layer", samples, True)
    probes.add_unseen(samples.part(0, 4), 0)
    probes.add_unseen(samples.part(4, 9), 4)
    rows, vectors = samples.gradients(0, 9).flatten(2), probes.vectors.flatten(1)
    terms = (rows @ vectors.mT)[..., None] * rows[:, :, None]  # (draws, samples, probes, size)
    both, difference = probes.unseen.flatten(2) * probes.unit
    torch.testing.assert_close(both, terms.sum((0, 1)))
    each = (terms[0] - terms[1]).permute(1, 2, 0)
    signs = torch.linalg.lstsq(each, difference[..., None]).solution[..., 0]
    torch.testing.assert_close(signs.abs(), torch.ones(9, 9))
    torch.testing.assert_close(signs, signs[:3].repeat(3, 1))
    assert len(signs.sign().unique(dim=0)) == 3
    monkeypatch.undo()
    whole = Probes(9, 0, "layer", samples, True)
    whole.add_unseen(samples, 0)  # in one go
    torch.testing.assert_close(whole.unseen * whole.unit, probes.unseen * probes.unit)


def test_a_zero_block_and_noise_alone() -> None:
    zeros, some = torch.zeros(4, 1, 2), torch.randn(4, 1, 2)
    assert _unbiased_error(zeros, zeros, zeros) == (0.0, 0.0)
    assert all(map(math.isnan, _unbiased_error(zeros, some, some)))
    error, deviation = _unbiased_error(some, 0.1 * torch.randn(4, 1, 2), some)
    assert error == 0.0 < deviation < 1
    assert math.isnan(_unbiased_error(some[:1], zeros[:1], zeros[:1])[1])
