"""A likelihood of the user's own, in a fit, in Laplace and in influence: Poisson counts."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import kfoc
from kfoc.likelihoods.draws import Draws
from models import batches


class Bare(kfoc.Likelihood):
    """Counts; the outputs are logarithms of their means. What a fit needs and nothing else."""

    def check(self, outputs: Tensor, targets: object, fisher: str) -> None:
        if fisher == "empirical" and not isinstance(targets, Tensor):
            raise ValueError("counts are needed")

    def drawn(self, outputs: Tensor, targets: object, draws: Draws) -> Tensor:
        uniform = draws.uniform(len(outputs), outputs[0].numel(), outputs.device)
        return outputs.exp().sqrt() * torch.special.ndtri(uniform).view(outputs.shape)

    def exact(self, outputs: Tensor, targets: object) -> Iterator[Tensor]:
        for k in range(outputs.shape[1]):
            yield outputs.exp().sqrt() * nn.functional.one_hot(torch.tensor(k), outputs.shape[1])

    def observed(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return targets - outputs.exp()


class Poisson(Bare):
    def log_likelihood(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return torch.distributions.Poisson(outputs.exp()).log_prob(targets).sum(1)

    def probabilities(self, outputs: Tensor) -> Tensor:
        return outputs.exp()


def problem(likelihood: kfoc.Likelihood) -> tuple[nn.Module, list, kfoc.Laplace]:
    x, model = torch.randn(30, 3), nn.Linear(3, 2)
    data = batches(x, torch.poisson(model(x).exp()).detach(), 8)
    curvature = kfoc.fit(model, data, likelihood, estimator=kfoc.BlockDiagonal(), fisher="exact")
    return model, data, kfoc.Laplace(model, curvature, 2.0, likelihood)


def dense(model: nn.Module, data: list) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Inputs with a one, counts, and the generalised Gauss-Newton of all samples, (8, 8)."""
    x, y = (torch.cat(parts) for parts in zip(*data, strict=True))
    ones = torch.cat([x, torch.ones(len(x), 1)], 1)
    outputs = model(x).detach()
    rows = torch.einsum("kc,ni->nkci", torch.eye(2), ones).flatten(2)
    precision = torch.einsum("nkp,nk,nkq->pq", rows, outputs.exp(), rows)
    return ones, y, rows, precision


def test_marginal_likelihood_and_tuning() -> None:
    model, data, laplace = problem(Poisson())
    _, y, _, hessian = dense(model, data)
    x = torch.cat([x for x, _ in data])
    log_likelihood = torch.distributions.Poisson(model(x).detach().exp()).log_prob(y).sum()
    theta = torch.cat([model.weight, model.bias[:, None]], 1).detach().flatten()

    def evidence(prior: float) -> float:
        logdet = torch.logdet(hessian + prior * torch.eye(8))
        return (log_likelihood + (8 * math.log(prior) - prior * theta @ theta - logdet) / 2).item()

    assert laplace.log_marginal_likelihood(data).item() == pytest.approx(evidence(2.0), rel=1e-10)
    best = laplace.tuned(data).prior_precision
    assert all(evidence(best) > evidence(best * factor) for factor in (0.9, 1.1))


def test_probabilities_are_means_over_draws() -> None:
    """Of a log-normal, which has its mean in closed form."""
    model, data, laplace = problem(Poisson())
    _, _, rows, hessian = dense(model, data)
    covariance = rows[:5] @ torch.linalg.inv(hessian + 2 * torch.eye(8)) @ rows[:5].mT
    x = data[0][0][:5]
    expected = (model(x).detach() + covariance.diagonal(dim1=1, dim2=2) / 2).exp()
    found = laplace.probabilities(x, "logits", num=4000)
    spread = expected * (covariance.diagonal(dim1=1, dim2=2).exp() - 1).sqrt()
    assert ((found - expected).abs() < 5 * spread / 4000**0.5).all()
    assert laplace.probabilities(x, "weights", num=5).shape == (5, 2)


@pytest.mark.filterwarnings("ignore:(the|with the) best prior precision:RuntimeWarning")
def test_tuned_by_validation_integrates_over_the_outputs() -> None:
    model, data, laplace = problem(Poisson())
    ones, y, rows, hessian = dense(model, data)
    outputs = model(ones[:, :3]).detach()
    losses = []
    for prior in (1e-3, 1.0, 1e3):
        covariance = rows @ torch.linalg.inv(hessian + prior * torch.eye(8)) @ rows.mT
        noise = torch.randn(20_000, 30, 2, 1)
        drawn = outputs + (torch.linalg.cholesky(covariance) @ noise)[..., 0]
        likely = torch.distributions.Poisson(drawn.exp()).log_prob(y).sum(-1)
        losses.append(math.log(20_000) - likely.logsumexp(0).mean().item())
    best = min(range(3), key=losses.__getitem__)
    found = [
        laplace.tuned_by_validation(data, [1e-3, 1.0, 1e3], chunk_size=size) for size in (None, 3)
    ]
    assert [each.prior_precision for each in found] == [(1e-3, 1.0, 1e3)[best]] * 2


def test_influence() -> None:
    model, data, laplace = problem(Bare())
    ones, y, _, hessian = dense(model, data)
    residuals = y - model(ones[:, :3]).detach().exp()
    gradients = torch.einsum("nk,ni->nki", residuals, ones).flatten(1)
    expected = -gradients[:4] @ torch.linalg.inv(hessian / 30 + 0.1 * torch.eye(8)) @ gradients.mT
    query = data[0][0][:4], data[0][1][:4]
    found = kfoc.influence(
        model, laplace.curvature, data, query, Bare(), damping=0.1, top=None
    ).scores
    torch.testing.assert_close(found, expected)


MISSING = {
    "log_likelihood": lambda laplace, data: laplace.tuned(data),
    "log_likelihood ": lambda laplace, data: laplace.tuned_by_validation(data),
    "probabilities": lambda laplace, data: laplace.probabilities(data[0][0]),
    "probabilities ": lambda laplace, data: laplace.probabilities(data[0][0], "weights"),
    "noise_variance": lambda laplace, data: laplace.predictive(data[0][0]),
    "noise_variance ": lambda laplace, data: replace(laplace, sigma_noise=2.0),
}


@pytest.mark.parametrize("method", MISSING)
def test_what_is_missing_is_named(method: str) -> None:
    _, data, laplace = problem(Bare())
    with pytest.raises(ValueError, match=f"the likelihood Bare has no method {method.strip()}"):
        MISSING[method](laplace, data)


def test_the_closed_form_is_not_for_all() -> None:
    _, data, laplace = problem(Poisson())
    message = 'the likelihood Poisson has no method moderated: use method="logits" or "weights"'
    with pytest.raises(ValueError, match=message):
        laplace.probabilities(data[0][0])


class Halves(Poisson):
    def log_likelihood(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return super().log_likelihood(outputs, targets).sum()


class Noisy(Poisson):
    def noise_variance(self, outputs: Tensor) -> Tensor:
        return torch.ones_like(outputs)


@pytest.mark.parametrize(
    ("likelihood", "message"),
    [
        (Halves(), r"log_likelihood of Halves must give a number for each of 8 samples, found"),
        (Noisy(), r"batch 0 of data: the likelihood Noisy has no method misfit\(outputs, targets"),
    ],
    ids=["shape", "noise"],
)
def test_methods_that_do_not_fit(likelihood: kfoc.Likelihood, message: str) -> None:
    _, data, laplace = problem(likelihood)
    with pytest.raises(ValueError, match=message):
        laplace.data_fit(data)
