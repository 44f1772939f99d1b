"""Laplace posteriors against dense linear algebra and plain autograd."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

import kfoc
from kfoc.applications.laplace import predictive
from kfoc.blocks import DampedBlock, Damping
from kfoc.model import sample_gradients as per_sample_jacobians
from kfoc.model.functional import Forward
from models import batches

KINDS = {
    "K-FOC": kfoc.KFOC(),
    "K-FAC": kfoc.KFAC(),
    "diagonal": kfoc.Diagonal(),
    "dense": kfoc.BlockDiagonal(),
    "EK-FOC": kfoc.EigenCorrected(kfoc.KFOC()),
}
PRECISIONS = {"0": 0.7, "3": 5.0}


def network(outputs: int = 3) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(1, 2, 2), nn.Tanh(), nn.Flatten(), nn.Linear(8, outputs))


def problem(likelihood: str = "categorical", estimator: kfoc.Estimator | None = None) -> tuple:
    """A model, its data in batches, and its curvature."""
    model, x = network(), torch.randn(40, 1, 3, 3)
    y = {
        "categorical": torch.randint(3, (40,)),
        "gaussian": torch.randn(40, 3),
        "bernoulli": torch.randint(2, (40, 3)).double(),
    }[likelihood]
    data = batches(x, y, 16)
    curvature = kfoc.fit(model, data, likelihood, estimator=estimator, fisher="exact")
    return model, data, curvature


def rows_of(model: nn.Module, x: Tensor) -> Tensor:
    """Jacobians (N, K, P), a backward pass per output, in the order of the blocks' rows."""
    parts = []
    for sample in x:
        outputs = model(sample[None]).flatten()
        rows = []
        for output in outputs:
            found = torch.autograd.grad(output, list(model.parameters()), retain_graph=True)
            w1, b1, w2, b2 = found
            first = torch.cat([w1.flatten(1), b1[:, None]], 1).flatten()
            rows.append(torch.cat([first, torch.cat([w2, b2[:, None]], 1).flatten()]))
        parts.append(torch.stack(rows))
    return torch.stack(parts)


def dense_precision(curvature: kfoc.Curvature, scale: float, priors: dict[str, float]) -> Tensor:
    return torch.block_diag(
        *[
            scale * block.to_dense() + priors[layer] * torch.eye(math.prod(block.shape))
            for layer, block in curvature.items()
        ]
    )


@pytest.mark.parametrize("kind", KINDS)
def test_linearised_outputs(kind: str) -> None:
    model, _, curvature = problem(estimator=KINDS[kind])
    laplace = kfoc.Laplace(model, curvature, PRECISIONS, temperature=0.5)
    x = torch.randn(5, 1, 3, 3)
    rows = rows_of(model, x)
    covariance = rows @ dense_precision(curvature, 80, PRECISIONS).inverse() @ rows.mT
    for chunk_size in (None, 2):
        found = laplace.linearised(x, chunk_size=chunk_size)
        torch.testing.assert_close(found.mean, model(x).detach())
        torch.testing.assert_close(found.covariance, covariance, rtol=1e-8, atol=1e-12)
    torch.testing.assert_close(found.variance, covariance.diagonal(dim1=1, dim2=2))


def test_regression() -> None:
    model, _, curvature = problem("gaussian")
    laplace = kfoc.Laplace(model, curvature, 2.0, "gaussian", sigma_noise=0.3)
    x = torch.randn(4, 1, 3, 3)
    rows = rows_of(model, x)
    precision = dense_precision(curvature, 40 / 0.3**2, {"0": 2.0, "3": 2.0})
    expected = rows @ precision.inverse() @ rows.mT + 0.09 * torch.eye(3)
    mean, covariance = laplace.predictive(x)
    torch.testing.assert_close(covariance, expected, rtol=1e-8, atol=1e-12)
    torch.testing.assert_close(mean, model(x).detach())


def test_predictive_of_drawn_networks_has_the_moments_of_the_linear_model() -> None:
    model = nn.Linear(4, 2)  # linear in its parameters: both predictives are one
    x = torch.randn(30, 4)
    curvature = kfoc.fit(model, [(x, None)], "gaussian", fisher="exact")
    laplace = kfoc.Laplace(model, curvature, 2.0, "gaussian", sigma_noise=0.5)
    closed = laplace.predictive(x[:3])
    drawn = laplace.predictive(x[:3], "weights", num=4000)
    spread = closed.covariance.diagonal(dim1=1, dim2=2).sqrt()
    assert ((drawn.mean - closed.mean).abs() < 4 * spread / 4000**0.5).all()
    torch.testing.assert_close(drawn.covariance, closed.covariance, rtol=0.1, atol=0.01)


@pytest.mark.parametrize("kind", ["K-FOC", "dense"])
def test_moments_of_parameter_draws(kind: str) -> None:
    model, _, curvature = problem(estimator=KINDS[kind])
    laplace = kfoc.Laplace(model, curvature, PRECISIONS)
    draws = laplace.sample(20_000, seed=3)
    assert draws["0.weight"].shape == (20_000, 2, 1, 2, 2)
    flat = torch.cat(
        [
            torch.cat([draws[f"{k}.weight"].flatten(2), draws[f"{k}.bias"][..., None]], 2)
            for k in ("3",)
        ],
        1,
    ).flatten(1)
    trained = torch.cat([model[3].weight, model[3].bias[:, None]], 1).detach().flatten()
    precision = 40 * curvature["3"].to_dense() + 5.0 * torch.eye(27)
    whitened = (flat - trained) @ torch.linalg.cholesky(precision)
    torch.testing.assert_close(whitened.mean(0), torch.zeros(27), rtol=0, atol=0.035)
    torch.testing.assert_close(torch.cov(whitened.mT), torch.eye(27), rtol=0, atol=0.05)


def test_draws_depend_on_the_seed_alone() -> None:
    model, data, curvature = problem()
    laplace = kfoc.Laplace(model, curvature)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    state = torch.get_rng_state()
    first = laplace.sampled_outputs(data[0][0], 3, seed=1)
    assert torch.equal(first, laplace.sampled_outputs(data[0][0], 3, seed=1))
    assert not torch.equal(first, laplace.sampled_outputs(data[0][0], 3, seed=2))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    drawn = laplace.sample(1, seed=1)
    one = functional_call(model, {k: v[0] for k, v in drawn.items()}, (data[0][0],))
    torch.testing.assert_close(first[0], one.detach())


@pytest.mark.parametrize("likelihood", ["categorical", "bernoulli"])
def test_probabilities(likelihood: str) -> None:
    model, _, curvature = problem(likelihood)
    laplace = kfoc.Laplace(model, curvature, 3.0, likelihood)
    x = torch.randn(6, 1, 3, 3)
    mean, covariance = laplace.linearised(x)
    link: Callable[[Tensor], Tensor] = (
        (lambda f: f.softmax(-1)) if likelihood == "categorical" else torch.sigmoid
    )
    variance = covariance.diagonal(dim1=1, dim2=2)
    expected = link(mean / (1 + math.pi / 8 * variance) ** 0.5)
    torch.testing.assert_close(laplace.probabilities(x), expected)
    # Against a reference of its own for the integral: draws by Cholesky, and many of them.
    noise = torch.randn(20_000, 6, 3, 1)
    drawn = mean + (torch.linalg.cholesky(covariance) @ noise)[..., 0]
    reference = link(drawn).mean(0)
    found = laplace.probabilities(x, "logits", num=4000)
    torch.testing.assert_close(found, reference, rtol=0, atol=0.02)
    by_weights = laplace.probabilities(x, "weights", num=50)
    outputs = laplace.sampled_outputs(x, 50)
    torch.testing.assert_close(by_weights, link(outputs).mean(0))


def test_draws_of_logits_have_their_covariance() -> None:
    root = torch.tensor([[2.0, 0.0, 0.0], [-1.5, 1.0, 0.0], [1.0, 2.0, 0.0]])  # singular
    outputs = kfoc.OutputGaussian(torch.tensor([[1.0, 0.0, -1.0]]), (root @ root.mT)[None])
    found = predictive.monte_carlo(kfoc.Categorical(), outputs, 20_000, 0)
    drawn = outputs.mean + torch.randn(100_000, 3) @ root.mT
    torch.testing.assert_close(found[0], drawn.softmax(-1).mean(0), rtol=0, atol=0.01)


def evidence(
    model: nn.Module,
    curvature: kfoc.Curvature,
    priors: dict[str, Tensor],
    log_likelihood: Tensor,
    scale: Tensor | float,
) -> Tensor:
    """`ln p(D | theta) + ln N(theta | 0, 1/prior) + P/2 ln 2 pi - logdet / 2`, term by term."""
    total = log_likelihood
    for layer, block in curvature.items():
        module = model.get_submodule(layer)
        theta = torch.cat([module.weight.flatten(), module.bias.flatten()]).detach()
        prior = torch.distributions.Normal(torch.zeros_like(theta), priors[layer] ** -0.5)
        eye = torch.eye(len(theta))
        precision = scale * block.to_dense() + priors[layer] * eye
        total = total + prior.log_prob(theta).sum() + len(theta) / 2 * math.log(2 * math.pi)
        total = total - torch.linalg.slogdet(precision).logabsdet / 2
    return total


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("likelihood", ["categorical", "gaussian", "bernoulli"])
def test_log_marginal_likelihood_and_its_gradient(likelihood: str, kind: str) -> None:
    model, data, curvature = problem(likelihood, KINDS[kind])
    laplace = kfoc.Laplace(model, curvature, likelihood=likelihood, temperature=0.5)
    x, y = (torch.cat(parts) for parts in zip(*data, strict=True))
    outputs = model(x).detach()

    def dense(priors: dict[str, Tensor], sigma: Tensor) -> Tensor:
        fitted = {
            "categorical": lambda: torch.distributions.Categorical(logits=outputs),
            "bernoulli": lambda: torch.distributions.Bernoulli(logits=outputs),
            "gaussian": lambda: torch.distributions.Normal(outputs, sigma),
        }[likelihood]()
        log_likelihood = fitted.log_prob(y).sum() / 0.5
        return evidence(model, curvature, priors, log_likelihood, 40 / 0.5 / sigma**2)

    def leaves() -> tuple[dict[str, Tensor], Tensor]:
        sigma = torch.tensor(0.8 if likelihood == "gaussian" else 1.0)
        return {k: torch.tensor(v, requires_grad=True) for k, v in PRECISIONS.items()}, sigma

    priors, sigma = leaves()
    if likelihood == "gaussian":
        sigma.requires_grad_()
    expected = dense(priors, sigma)
    fit = laplace.data_fit(data)
    assert fit.num_samples == 40
    found = laplace.log_marginal_likelihood(fit, prior_precision=priors, sigma_noise=sigma)
    assert found.item() == pytest.approx(expected.item(), rel=1e-10)
    wanted = [*priors.values()] + ([sigma] if sigma.requires_grad else [])
    for a, b in zip(
        torch.autograd.grad(found, wanted), torch.autograd.grad(expected, wanted), strict=True
    ):
        assert a.item() == pytest.approx(b.item(), rel=1e-8)


def test_one_precision_for_all_layers() -> None:
    model, data, curvature = problem()
    laplace = kfoc.Laplace(model, curvature, 2.5)
    by_layer = laplace.log_marginal_likelihood(data, prior_precision={"0": 2.5, "3": 2.5})
    assert laplace.log_marginal_likelihood(data).item() == pytest.approx(by_layer.item())
    prior = torch.tensor(2.5, requires_grad=True)
    laplace.log_marginal_likelihood(data, prior_precision=prior).backward()
    ends = [
        laplace.log_marginal_likelihood(data, prior_precision=p).item() for p in (2.4999, 2.5001)
    ]
    assert prior.grad.item() == pytest.approx((ends[1] - ends[0]) / 2e-4, rel=1e-5)


@pytest.mark.parametrize("per_layer", [False, True])
@pytest.mark.parametrize("noise", [False, True])
def test_tuned_to_where_the_gradient_vanishes(per_layer: bool, noise: bool) -> None:
    model, data, curvature = problem("gaussian")
    start = kfoc.Laplace(model, curvature, 1.0, "gaussian", sigma_noise=0.9)
    tuned = start.tuned(data, per_layer=per_layer, noise=noise)
    assert start.prior_precision == 1.0
    assert isinstance(tuned.prior_precision, dict) == per_layer
    assert (tuned.sigma_noise != 0.9) == noise
    values = tuned.prior_precision if per_layer else {"": tuned.prior_precision}
    logs = [torch.tensor(math.log(v), requires_grad=True) for v in values.values()]
    log_sigma = torch.tensor(math.log(tuned.sigma_noise), requires_grad=True)
    priors = dict(zip(values, [log.exp() for log in logs], strict=True))
    found = tuned.log_marginal_likelihood(
        data, prior_precision=priors if per_layer else priors[""], sigma_noise=log_sigma.exp()
    )
    grads = torch.autograd.grad(found, [*logs, log_sigma])
    assert all(abs(grad.item()) < 1e-3 for grad in grads[: None if noise else -1])
    assert found > start.log_marginal_likelihood(data)


def test_a_precision_for_a_sum_of_products() -> None:
    """Its log-determinant is undefined under too small a precision, which the search leaves out."""
    model = nn.Sequential(nn.Linear(30, 20), nn.Tanh(), nn.Linear(20, 3))
    data = [(torch.randn(60, 30), torch.randint(3, (60,)))]
    curvature = kfoc.fit(model, data, estimator=kfoc.KFOC(rank=2), layers="0")
    laplace = kfoc.Laplace(model, curvature)
    tuned = laplace.tuned(data, bounds=(1e-2, 1e4))
    best = tuned.log_marginal_likelihood(data)
    for factor in (0.9, 1.1):
        other = tuned.prior_precision * factor
        assert laplace.log_marginal_likelihood(data, prior_precision=other) < best
    dense = 60 * curvature["0"].to_dense() + tuned.prior_precision * torch.eye(20 * 31)
    theta = torch.cat([model[0].weight.flatten(), model[0].bias]).detach()
    likelihood = -nn.functional.cross_entropy(model(data[0][0]), data[0][1], reduction="sum")
    prior = tuned.prior_precision
    terms = len(theta) * math.log(prior) - prior * theta @ theta - dense.logdet()
    assert best.item() == pytest.approx((likelihood + terms / 2).item(), rel=1e-8)
    smallest = torch.linalg.eigvalsh(curvature["0"].to_dense())[0].item()
    assert smallest < 0
    with pytest.raises(ValueError, match=r"layer '0': .*indefinite"):
        laplace.log_marginal_likelihood(data, prior_precision=-60 * smallest * 0.9)


class Own(kfoc.DenseBlock):
    def damped(self, damping: Damping) -> DampedBlock:
        return OwnDamped(super().damped(damping))


@dataclass(frozen=True)
class OwnDamped(DampedBlock):
    """Of another, all but its eigenvalues."""

    base: DampedBlock
    dtype = property(lambda self: self.base.dtype)
    shape = property(lambda self: self.base.shape)
    device = property(lambda self: self.base.device)

    def power(self, vectors: Tensor, exponent: float) -> Tensor:
        return self.base.power(vectors, exponent)

    def logdet(self) -> float:
        return self.base.logdet()

    def redamped(self, damping: Damping) -> DampedBlock:
        return OwnDamped(self.base.redamped(damping))


def test_evidence_without_eigenvalues() -> None:
    """Of a kind of block that is not the library's own: a number, and no derivative."""
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))
    data = [(torch.randn(20, 5), torch.randint(3, (20,)))]
    found = kfoc.fit(model, data, estimator=kfoc.BlockDiagonal())
    own = {name: Own(block.matrix, block.shape) for name, block in found.items()}
    curvature = replace(found, blocks=own)
    laplace = kfoc.Laplace(model, curvature)
    found = laplace.log_marginal_likelihood(data)
    logdet = curvature.logdet(1.0, scale=20.0)
    theta = torch.cat([p.detach().flatten() for p in model.parameters()])
    likelihood = -nn.functional.cross_entropy(model(data[0][0]), data[0][1], reduction="sum")
    assert found.item() == pytest.approx((likelihood - (theta @ theta + logdet) / 2).item())
    with pytest.raises(ValueError, match=r"layer '0': .* no derivative here"):
        laplace.log_marginal_likelihood(data, prior_precision=torch.tensor(1.0, requires_grad=True))


@pytest.mark.parametrize("candidates", [[0.1, 1.0, 30.0], [1e3, 1e4, 1e5], [1e-3, 1e-2, 1e-1]])
@pytest.mark.parametrize("likelihood", ["categorical", "gaussian", "bernoulli"])
def test_tuned_by_validation(likelihood: str, candidates: list[float]) -> None:
    model, _, curvature = problem(likelihood)
    laplace = kfoc.Laplace(model, curvature, 1.0, likelihood)
    x = torch.randn(30, 1, 3, 3)
    y = torch.randn(30, 3) if likelihood == "gaussian" else torch.randint(2, (30, 3)).double()
    y = torch.randint(3, (30,)) if likelihood == "categorical" else y
    likely = {
        "categorical": lambda f: nn.functional.cross_entropy(f, y),
        "gaussian": lambda f: -torch.distributions.Normal(f, 1.0).log_prob(y).sum(1).mean(),
        "bernoulli": lambda f: nn.functional.binary_cross_entropy_with_logits(f, y),
    }
    plain = likely[likelihood](model(x)).item()
    losses = []
    for prior in candidates:
        one = kfoc.Laplace(model, curvature, prior, likelihood)
        if likelihood == "gaussian":
            mean, covariance = one.predictive(x)
            normal = torch.distributions.MultivariateNormal(mean, covariance)
            losses.append(-normal.log_prob(y).mean())
        elif likelihood == "categorical":
            losses.append(nn.functional.nll_loss(one.probabilities(x).log(), y))
        else:
            losses.append(nn.functional.binary_cross_entropy(one.probabilities(x), y))
    best = int(torch.stack(losses).argmin())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = laplace.tuned_by_validation(batches(x, y, 20), candidates, chunk_size=7)
    assert found.prior_precision == candidates[best]
    told = [str(warning.message) for warning in caught]
    assert {warning.filename for warning in caught} <= {__file__}
    edge = "largest" if candidates[best] == max(candidates) else "smallest"
    assert any(f"is the {edge} candidate" in text for text in told) == (best in (0, 2))
    worse = losses[best].item() > plain
    assert any("worse than the network by itself" in text for text in told) == worse
    assert len(told) == (best in (0, 2)) + worse
    if worse:
        assert f"{losses[best].item():.4g} and {plain:.4g}" in told[-1]


def test_layers_that_are_left_out_stay_certain() -> None:
    model, data, _ = problem()
    curvature = kfoc.fit(model, data, layers="3")
    laplace = kfoc.Laplace(model, curvature)
    assert laplace.sample().keys() == {"3.weight", "3.bias"}
    features = model[:3](data[0][0][:2]).detach()
    extended = torch.cat([features, torch.ones(2, 1)], 1)
    rows = torch.einsum("kc,ni->nkci", torch.eye(3), extended).flatten(2)
    precision = 40 * curvature["3"].to_dense() + torch.eye(27)
    expected = rows @ precision.inverse() @ rows.mT
    torch.testing.assert_close(laplace.linearised(data[0][0][:2]).covariance, expected)


class ByValue(nn.Module):
    """Chooses by a value what it does, which vmap cannot follow; one parameter is never used."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([(self.first if row[0] > 0 else self.second)(row) for row in x])


def test_models_that_vmap_cannot_run() -> None:
    model, x = ByValue(), torch.randn(6, 4)
    forward = Forward(model)
    parameters = forward.parameters(dict(model.named_parameters()))
    found = per_sample_jacobians.jacobians(forward, parameters, x)
    cotangents = torch.randn(6, 3)
    gradients = per_sample_jacobians.gradients(forward, parameters, x, cotangents)
    for n, row in enumerate(x):
        taken, other = ("first", "second") if row[0] > 0 else ("second", "first")
        expected = torch.einsum("kc,i->kci", torch.eye(3), row)
        torch.testing.assert_close(found[f"{taken}.weight"][n], expected)
        assert not found[f"{other}.weight"][n].any()
        torch.testing.assert_close(gradients[f"{taken}.weight"][n], torch.outer(cotangents[n], row))


class OfDicts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 2)

    def forward(self, values: Tensor, mask: Tensor) -> dict[str, Tensor]:
        return {"logits": self.layer(values * mask)}


def test_dict_batches_and_outputs_that_are_no_tensor() -> None:
    model = OfDicts()
    inputs = {"values": torch.randn(9, 4), "mask": torch.randint(2, (9, 4)).double()}
    data = [(inputs, torch.randint(2, (9,)))]

    def predict(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
        return model(**inputs)["logits"]

    curvature = kfoc.fit(model, data, predict=predict)
    with pytest.raises(ValueError, match="returned a dict, not a tensor: pass predict"):
        kfoc.Laplace(model, curvature).linearised(inputs)
    laplace = kfoc.Laplace(model, curvature, predict=predict).tuned(data, bounds=(1e-9, 1e9))
    plain = nn.Sequential(model.layer)
    renamed = kfoc.fit(plain, [(inputs["values"] * inputs["mask"], data[0][1])])
    twin = kfoc.Laplace(plain, renamed, laplace.prior_precision)
    torch.testing.assert_close(
        laplace.probabilities(inputs), twin.probabilities(inputs["values"] * inputs["mask"])
    )


class Tied(nn.Module):
    """Predicts the next token, with one weight for the embedding and the head."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(5, 4), nn.Linear(4, 5, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(torch.tanh(self.embedding(tokens)))


def test_tied_weights_vary_in_both_of_their_places() -> None:
    model, tokens = Tied(), torch.randint(5, (8, 3))
    curvature = kfoc.fit(model, [(tokens, tokens)], estimator=kfoc.BlockDiagonal())
    (layer,) = curvature.layers
    laplace = kfoc.Laplace(model, curvature, 2.0)
    rows = [
        torch.autograd.grad(output, model.head.weight, retain_graph=True)[0].flatten()
        for output in model(tokens[:1]).flatten()
    ]
    order = curvature.layouts[layer].join(
        {curvature.layouts[layer].names[0]: torch.stack(rows).view(15, 5, 4)}
    )
    jacobian = order.flatten(1)
    precision = 8 * curvature[layer].to_dense() + 2 * torch.eye(20)
    expected = jacobian @ precision.inverse() @ jacobian.mT
    torch.testing.assert_close(laplace.linearised(tokens[:1]).covariance[0], expected)
    (name,) = curvature.layouts[layer].names
    drawn = laplace.sample(1, seed=0)[name][0]
    weights = drawn, torch.tanh(drawn[tokens])
    outputs = laplace.sampled_outputs(tokens, 1, seed=0)[0]
    torch.testing.assert_close(outputs, weights[1] @ weights[0].mT)


def test_labels_of_sequences_and_images() -> None:
    model = nn.Conv2d(2, 3, 1)
    x, y = torch.randn(5, 2, 2, 3), torch.randint(3, (5, 2, 3))
    y[0, 0, 0] = -100
    laplace = kfoc.Laplace(model, kfoc.fit(model, [(x, y)]))
    fit = laplace.data_fit([(x, y)])
    assert fit.num_labels == 29
    loss = nn.functional.cross_entropy(model(x), y, reduction="sum")
    assert fit.misfit == pytest.approx(loss.item())
    found = laplace.probabilities(x)
    assert found.shape == (5, 3, 2, 3)
    torch.testing.assert_close(found.sum(1), torch.ones(5, 2, 3))
    last = nn.Linear(2, 3)
    tokens = torch.randn(4, 6, 2)
    chosen = kfoc.Laplace(last, kfoc.fit(last, [(tokens, None)])).probabilities(tokens)
    torch.testing.assert_close(chosen.sum(-1), torch.ones(4, 6))
    with pytest.warns(RuntimeWarning, match="is the smallest candidate, 1e-06"):
        validated = laplace.tuned_by_validation([(x, y)], [1e-6, 1e6])
    assert validated.prior_precision == 1e-6


def test_float32_models() -> None:
    model = network().float()
    x, y = torch.randn(20, 1, 3, 3).float(), torch.randint(3, (20,))
    laplace = kfoc.Laplace(model, kfoc.fit(model, [(x, y)])).tuned([(x, y)])
    assert laplace.probabilities(x).dtype == torch.float32
    assert laplace.sample(2)["0.weight"].dtype == torch.float32


def test_repr_and_shared_factorisation() -> None:
    model, data, curvature = problem()
    laplace = kfoc.Laplace(model, curvature, PRECISIONS)
    assert repr(laplace) == "Laplace of 2 layers, prior precision 0: 0.7, 3: 5"
    tuned = laplace.tuned(data)
    assert "prior precision all: " in repr(tuned)
    assert tuned._factorised is laplace._factorised


BAD = {
    "prior": ({"prior_precision": 0.0}, "prior_precision must be one finite and positive number"),
    "prior by layer": ({"prior_precision": {"0": 1.0}}, r"missing: \['3'\], unknown: \[\]"),
    "likelihood": ({"likelihood": "poisson"}, "likelihood must be one of categorical, gaussian"),
    "noise": (
        {"sigma_noise": 2.0},
        "Categorical has no method noise_variance: sigma_noise must be 1, found 2.0",
    ),
    "temperature": ({"temperature": 0.0}, "temperature must be finite and positive"),
    "samples": ({"num_samples": 0}, "num_samples must be at least 1"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_configurations(case: str) -> None:
    model, _, curvature = problem()
    options, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        kfoc.Laplace(model, curvature, **options)


def test_bad_calls() -> None:
    model, data, curvature = problem()
    laplace = kfoc.Laplace(model, curvature)
    x = data[0][0]
    with pytest.raises(ValueError, match="method must be one of probit, logits, weights"):
        laplace.probabilities(x, "mc")
    with pytest.raises(ValueError, match=r"use probabilities\(\)"):
        laplace.predictive(x)
    with pytest.raises(ValueError, match="the data have 16 samples, but the posterior is one of"):
        laplace.log_marginal_likelihood(data[:1])
    with pytest.raises(ValueError, match="noise=True is for the gaussian"):
        laplace.tuned(data, noise=True)
    with pytest.raises(ValueError, match="chunk_size must be at least 1"):
        laplace.linearised(x, chunk_size=0)
    with pytest.raises(ValueError, match=r"the model has no parameter 3\.weight"):
        kfoc.Laplace(nn.Sequential(network()[0]), curvature).sample()
    with pytest.warns(RuntimeWarning, match="the best prior precision is at the bound 1e-08 of"):
        laplace.tuned(data, bounds=(1e-10, 1e-8))
    model.append(nn.Dropout())
    with pytest.raises(ValueError, match=r"layer '4' \(Dropout\) is in train mode"):
        laplace.linearised(x)


def test_a_curvature_of_part_of_the_data() -> None:
    model, data, _ = problem()
    part = kfoc.fit(model, data[:1], fisher="exact")
    laplace = kfoc.Laplace(model, part, 2.0, num_samples=40)
    precision = dense_precision(part, 40, {"0": 2.0, "3": 2.0})
    rows = rows_of(model, data[0][0][:2])
    torch.testing.assert_close(
        laplace.linearised(data[0][0][:2]).covariance, rows @ precision.inverse() @ rows.mT
    )
    assert laplace.log_marginal_likelihood(data).isfinite()


CALLS: dict[str, tuple[str, Callable]] = {
    "data_fit": ("batch 1 of data", lambda laplace, data: laplace.data_fit(data)),
    "tuned": ("batch 1 of data", lambda laplace, data: laplace.tuned(data)),
    "log_marginal_likelihood": (
        "batch 1 of data",
        lambda laplace, data: laplace.log_marginal_likelihood(data),
    ),
    "tuned_by_validation": (
        "batch 1 of data",
        lambda laplace, data: laplace.tuned_by_validation(data, [0.1, 1.0, 10.0]),
    ),
    "linearised": ("inputs", lambda laplace, data: laplace.linearised(data[1][0])),
    "sampled_outputs": ("inputs", lambda laplace, data: laplace.sampled_outputs(data[1][0], 2)),
    "predictive": ("inputs", lambda laplace, data: laplace.predictive(data[1][0])),
    "predictive by weights": (
        "inputs",
        lambda laplace, data: laplace.predictive(data[1][0], "weights", num=2),
    ),
    **{
        method: ("inputs", lambda laplace, data, m=method: laplace.probabilities(data[1][0], m))
        for method in ("probit", "logits", "weights")
    },
    "influence of data": (
        "batch 1 of data",
        lambda laplace, data: kfoc.influence(
            laplace.model, laplace.curvature, data, data[0], laplace.likelihood
        ),
    ),
    "influence on a query": (
        "query",
        lambda laplace, data: kfoc.influence(
            laplace.model, laplace.curvature, data[:1], data[1], laplace.likelihood
        ),
    ),
}
BROKEN = {
    "inputs of NaN": lambda x, y: (x.clone().index_fill_(0, torch.tensor([3]), math.nan), y),
    "infinite inputs": lambda x, y: (x.clone().index_fill_(0, torch.tensor([3]), math.inf), y),
    "targets of NaN": lambda x, y: (x, y.clone().index_fill_(0, torch.tensor([3]), math.nan)),
    "infinite targets": lambda x, y: (x, y.clone().index_fill_(0, torch.tensor([3]), math.inf)),
    "no samples": lambda x, y: (x[:0], y[:0]),
}


@pytest.mark.parametrize("case", BROKEN)
@pytest.mark.parametrize("likelihood", ["categorical", "gaussian", "bernoulli"])
@pytest.mark.parametrize("call", CALLS)
def test_values_that_are_not_finite_are_told(call: str, likelihood: str, case: str) -> None:
    """With the argument and the batch: never a score or a prior that came of NaN."""
    if "predictive" in call and likelihood != "gaussian":
        pytest.skip("for regression alone")
    if call in ("probit", "logits", "weights") and likelihood == "gaussian":
        pytest.skip("for labels alone")
    where, function = CALLS[call]
    if "targets" in case and (likelihood == "categorical" or where == "inputs"):
        pytest.skip("has no such targets")
    if case == "no samples" and where.startswith("batch"):
        pytest.skip("batches without samples are passed over")
    model, data, curvature = problem(likelihood, kfoc.Diagonal())
    laplace = kfoc.Laplace(model, curvature, likelihood=likelihood)
    data = [data[0], BROKEN[case](*data[1]), data[2]]
    expected = {"no samples": "there are no samples|has no samples"}.get(
        case, "not finite|out of range"
    )
    with pytest.raises(ValueError, match=f"^{where}: .*({expected})"):
        function(laplace, data)


def test_parameters_that_are_not_finite_are_told() -> None:
    model, data, curvature = problem()
    laplace = kfoc.Laplace(model, curvature)
    fit = laplace.data_fit(data)
    with torch.no_grad():
        model[3].bias[0] = math.nan
    for call in (
        lambda: laplace.probabilities(data[0][0]),
        lambda: laplace.tuned_by_validation(data),
        lambda: kfoc.influence(model, curvature, data, data[0]),
    ):
        with pytest.raises(ValueError, match="look at the model's parameters"):
            call()
    with pytest.raises(ValueError, match="not a number"):
        laplace.tuned(fit)
    with pytest.raises(ValueError, match="misfit is not finite"):
        laplace.tuned(replace(fit, misfit=math.nan))


def test_derivatives_that_are_not_finite_are_told() -> None:
    """Of finite outputs: a root at zero."""

    class Root(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(2, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x).abs().sqrt()

    model, x, y = Root(), torch.randn(4, 2), torch.tensor([0, 1, 2, 0])
    laplace = kfoc.Laplace(model, kfoc.fit(model, [(x, y)], estimator=kfoc.Diagonal()))
    nn.init.zeros_(model.linear.bias)
    zeros = torch.zeros(4, 2)
    with pytest.raises(ValueError, match=r"inputs: the derivatives by 'linear\.\w+' have values"):
        laplace.linearised(zeros)
    with pytest.raises(ValueError, match=r"query: the derivatives by 'linear\.\w+' have values"):
        kfoc.influence(model, laplace.curvature, [(x, y)], (zeros, y))


def test_draws_beyond_range_are_told() -> None:
    """Of weights that no sample moves: their variance is the prior's alone, on every machine."""
    model, data, _ = problem()
    still = [(torch.zeros_like(x).float(), y) for x, y in data]
    curvature = kfoc.fit(model.float(), still, estimator=kfoc.Diagonal())
    laplace = kfoc.Laplace(model, curvature, 1e-90, num_samples=1)
    with pytest.raises(ValueError, match="drawn from the posterior are not finite: a larger"):
        laplace.sampled_outputs(data[0][0].float())
