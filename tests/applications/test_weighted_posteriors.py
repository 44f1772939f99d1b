"""Weights and noise in Laplace and influence, against dense algebra."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import kfoc
from models import batches

WEIGHT = torch.tensor([0.5, 3.0, 1.0], dtype=torch.float64)
COUNT = 24


def inputs() -> tuple[nn.Linear, Tensor, Tensor]:
    """A linear model, its inputs, and Jacobians (N, K, P) by [W | b]."""
    model, x = nn.Linear(4, 3), torch.randn(COUNT, 4)
    ones = torch.cat([x, torch.ones(COUNT, 1)], 1)
    return model, x, torch.einsum("kc,ni->nkci", torch.eye(3), ones).flatten(2)


def fitted(model: nn.Module, data: list, likelihood: kfoc.Likelihood, **options) -> kfoc.Laplace:
    exact = {"fisher": "exact", "estimator": kfoc.BlockDiagonal()}
    return kfoc.Laplace(
        model, kfoc.fit(model, data, likelihood, **exact), likelihood=likelihood, **options
    )


def evidence(model: nn.Linear, log_likelihood: Tensor, hessian: Tensor, prior: float) -> float:
    theta = torch.cat([model.weight, model.bias[:, None]], 1).detach().flatten()
    logdet = torch.logdet(hessian + prior * torch.eye(15))
    return (log_likelihood + (15 * math.log(prior) - prior * theta @ theta - logdet) / 2).item()


def test_the_posterior_of_a_weighted_loss() -> None:
    """Its precision is the Hessian of the weighted loss, which is convex here, plus the prior's."""
    model, x, rows = inputs()
    y = torch.randint(3, (COUNT,))
    likelihood = kfoc.Categorical(weight=WEIGHT, label_smoothing=0.1)
    laplace = fitted(model, batches(x, y, 10), likelihood, prior_precision=2.0)

    def loss(matrix: Tensor) -> Tensor:
        logits = x @ matrix[:, :-1].T + matrix[:, -1]
        return functional.cross_entropy(
            logits, y, weight=WEIGHT, label_smoothing=0.1, reduction="sum"
        )

    theta = torch.cat([model.weight, model.bias[:, None]], 1).detach()
    hessian = torch.autograd.functional.hessian(loss, theta).reshape(15, 15)
    covariance = rows[:5] @ torch.linalg.inv(hessian + 2 * torch.eye(15)) @ rows[:5].mT
    torch.testing.assert_close(laplace.linearised(x[:5]).covariance, covariance)
    fit = laplace.data_fit(batches(x, y, 10))
    assert fit.misfit == pytest.approx(loss(theta).item())
    found = laplace.log_marginal_likelihood(fit).item()
    assert found == pytest.approx(evidence(model, -loss(theta), hessian, 2.0))


@pytest.mark.parametrize("sigma", [1.0, 0.7])
def test_noise_per_output(sigma: float) -> None:
    model, x, rows = inputs()
    y, variance = torch.randn(COUNT, 3), torch.tensor([0.2, 1.0, 4.0])
    likelihood = kfoc.Gaussian(var=variance)
    laplace = fitted(model, batches(x, y, 10), likelihood, prior_precision=2.0, sigma_noise=sigma)
    noise = sigma**2 * variance
    hessian = torch.einsum("nkp,k,nkq->pq", rows, 1 / noise, rows)
    normal = torch.distributions.Normal(model(x).detach(), noise.sqrt())
    expected = evidence(model, normal.log_prob(y).sum(), hessian, 2.0)
    assert laplace.log_marginal_likelihood(batches(x, y, 10)).item() == pytest.approx(expected)
    covariance = rows[:5] @ torch.linalg.inv(hessian + 2 * torch.eye(15)) @ rows[:5].mT
    found = laplace.predictive(x[:5])
    torch.testing.assert_close(found.covariance, covariance + noise.diag())
    drawn = laplace.predictive(x[:5], "weights", num=2)
    assert (drawn.variance > noise).all()


def test_weights_of_samples() -> None:
    """As if each sample were there so many times: evidence, and the noise that is best."""
    model, x, _ = inputs()
    y, weights = torch.randn(COUNT, 3), torch.randint(4, (COUNT,))
    index = torch.arange(COUNT).repeat_interleave(weights)
    one = fitted(model, batches(x[index], y[index], 10), kfoc.Gaussian())
    data = [(x, (y, weights.double()))]
    weighted = fitted(model, data, kfoc.SampleWeighted(kfoc.Gaussian()))
    found, expected = (
        each.tuned(of, noise=True)
        for each, of in ((weighted, data), (one, batches(x[index], y[index], 10)))
    )
    assert found.prior_precision == pytest.approx(expected.prior_precision, rel=1e-4)
    assert found.sigma_noise == pytest.approx(expected.sigma_noise, rel=1e-4)
    evidences = [
        each.log_marginal_likelihood(of, sigma_noise=0.6).item()
        for each, of in ((weighted, data), (one, batches(x[index], y[index], 10)))
    ]
    assert evidences[0] == pytest.approx(evidences[1])


@pytest.mark.parametrize("kind", ["gaussian", "categorical"])
def test_weights_in_held_out_data(kind: str) -> None:
    """Losses are those of data with repeated samples."""
    model, x, _ = inputs()
    y = torch.randn(COUNT, 3) if kind == "gaussian" else torch.randint(3, (COUNT,))
    weights = torch.randint(4, (COUNT,))
    index = torch.arange(COUNT).repeat_interleave(weights)
    found = []
    for likelihood, held_out in (
        (kfoc.SampleWeighted(kind), [(x, (y, weights.double()))]),
        (kind, [(x[index], y[index])]),
    ):
        curvature = kfoc.fit(model, [(x, None)], kind, fisher="exact")
        laplace = kfoc.Laplace(model, curvature, likelihood=likelihood)
        found.append(laplace.validated(held_out, [0.1, 10.0]))
    assert found[0].plain == pytest.approx(found[1].plain)
    assert found[0].losses == pytest.approx(found[1].losses)


def test_influence_of_a_weighted_loss() -> None:
    """Scores are by the weighted terms of the loss, with the Hessian of it."""
    model, x, rows = inputs()
    y, weights = torch.randint(3, (COUNT,)), torch.rand(COUNT)
    likelihood = kfoc.SampleWeighted(kfoc.Categorical(weight=WEIGHT))
    data = [(x, (y, weights))]
    curvature = kfoc.fit(model, data, likelihood, fisher="exact", estimator=kfoc.BlockDiagonal())
    p = model(x).detach().softmax(1)
    total = weights * WEIGHT[y]
    gradients = torch.einsum("nkp,nk->np", rows, total[:, None] * (p - functional.one_hot(y, 3)))
    middle = total[:, None, None] * (p.diag_embed() - p[:, :, None] * p[:, None, :])
    hessian = torch.einsum("nkp,nkl,nlq->pq", rows, middle, rows) / COUNT
    expected = -gradients[:4] @ torch.linalg.inv(hessian + 0.1 * torch.eye(15)) @ gradients.mT
    query = x[:4], (y[:4], weights[:4])
    found = kfoc.influence(model, curvature, data, query, likelihood, damping=0.1, top=None)
    torch.testing.assert_close(found.scores, expected)


def test_soft_labels() -> None:
    model, x, _ = inputs()
    targets = torch.randn(COUNT, 3).softmax(1)
    laplace = fitted(model, batches(x, targets, 10), kfoc.Categorical())
    fit = laplace.data_fit(batches(x, targets, 10))
    expected = functional.cross_entropy(model(x), targets, reduction="sum").item()
    assert fit.misfit == pytest.approx(expected)
    assert fit.num_labels == COUNT


def test_heteroscedastic_targets() -> None:
    model, x, y = nn.Linear(4, 6), torch.randn(COUNT, 4), torch.randn(COUNT, 3)
    laplace = fitted(model, batches(x, y, 10), kfoc.HeteroscedasticGaussian())
    mean, log_variance = model(x).detach().chunk(2, 1)
    fit = laplace.data_fit(batches(x, y, 10))
    normal = torch.distributions.Normal(mean, (log_variance / 2).exp())
    assert fit.misfit == pytest.approx(-normal.log_prob(y).sum().item())
    assert math.isfinite(laplace.tuned(fit).prior_precision)
    assert laplace.linearised(x[:2]).covariance.shape == (2, 6, 6)
    with pytest.raises(ValueError, match="HeteroscedasticGaussian has no method noise_variance"):
        laplace.predictive(x)
    with pytest.raises(ValueError, match="HeteroscedasticGaussian has no method noise_variance"):
        replace(laplace, likelihood=kfoc.SampleWeighted(laplace.likelihood), sigma_noise=2.0)
