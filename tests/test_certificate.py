"""The one-pass certificate against the dense error, for every estimator."""

import pytest
import torch

import kfoc
import oracle
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
    from kfoc.certificate import Probes
    from kfoc.samples import Rows, Samples

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
