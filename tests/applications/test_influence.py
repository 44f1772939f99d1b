"""Influence scores against dense solves and against retraining without the sample."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import kfoc
from dense_fisher import dense, jacobian
from models import batches
from test_laplace import problem, rows_of

DECAY = 0.02


def losses(likelihood: str, outputs: Tensor, targets: Tensor) -> Tensor:
    """Of each sample."""
    if likelihood == "categorical":
        return nn.functional.cross_entropy(outputs, targets, reduction="none")
    if likelihood == "gaussian":
        return 0.5 * (outputs - targets).square().flatten(1).sum(1)
    return nn.functional.binary_cross_entropy_with_logits(outputs, targets, reduction="none").sum(1)


def sample_rows(model: nn.Module, likelihood: str, x: Tensor, y: Tensor) -> Tensor:
    """Gradients (N, P) of each sample's loss by the chain rule over dense Jacobians."""
    outputs = model(x).detach().requires_grad_()
    (by_outputs,) = torch.autograd.grad(losses(likelihood, outputs, y).sum(), outputs)
    return torch.einsum("nk,nkp->np", by_outputs, rows_of(model, x))


@pytest.mark.parametrize("likelihood", ["categorical", "gaussian", "bernoulli"])
def test_scores_against_dense_solves(likelihood: str) -> None:
    model, data, curvature = problem(likelihood)
    x, y = (torch.cat(parts) for parts in zip(*data, strict=True))
    query = x[5:8] + 0.1, y[5:8]
    fisher = torch.block_diag(*[block.to_dense() for block in curvature.values()])
    matrix = fisher + 0.05 * torch.eye(len(fisher))
    rows = sample_rows(model, likelihood, x, y)
    expected = -sample_rows(model, likelihood, *query) @ matrix.inverse() @ rows.mT
    found = kfoc.influence(
        model, curvature, data, query, likelihood, damping=0.05, top=None, chunk_size=3
    )
    torch.testing.assert_close(found.scores, expected, rtol=1e-8, atol=1e-12)
    assert found.num_samples == 40
    few = kfoc.influence(model, curvature, data, query, likelihood, damping=0.05, top=4)
    assert few.scores is None
    lowest = expected.argsort(1)
    assert torch.equal(few.helpful.indices, lowest[:, :4])
    assert torch.equal(few.harmful.indices, lowest.flip(1)[:, :4])
    torch.testing.assert_close(few.helpful.scores, expected.gather(1, lowest[:, :4]))
    torch.testing.assert_close(few.harmful.scores, expected.gather(1, lowest.flip(1)[:, :4]))


@pytest.mark.parametrize("likelihood", ["categorical", "gaussian", "bernoulli"])
def test_self_influence_against_dense_solves(likelihood: str) -> None:
    model, data, curvature = problem(likelihood)
    x, y = (torch.cat(parts) for parts in zip(*data, strict=True))
    fisher = torch.block_diag(*[block.to_dense() for block in curvature.values()])
    matrix = fisher + 0.05 * torch.eye(len(fisher))
    rows = sample_rows(model, likelihood, x, y)
    expected = (rows @ matrix.inverse() * rows).sum(1)
    options: dict = {"damping": 0.05, "chunk_size": 3}
    found = kfoc.self_influence(model, curvature, data, likelihood, **options)
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-12)
    same = kfoc.influence(model, curvature, data, (x, y), likelihood, top=None, **options)
    torch.testing.assert_close(found, -same.scores.diagonal())


@pytest.mark.parametrize("likelihood", ["categorical", "gaussian", "bernoulli"])
def test_products_come_to_the_exact_solve(likelihood: str) -> None:
    model, data, curvature = problem(likelihood)
    x, y = (torch.cat(parts) for parts in zip(*data, strict=True))
    query = x[5:8] + 0.1, y[5:8]
    matrix = dense(model, data, likelihood)
    matrix = matrix + 0.05 * torch.eye(len(matrix))
    held = list(model.parameters())
    rows, wanted = (jacobian(losses(likelihood, model(a), b), held) for a, b in ((x, y), query))
    expected = -wanted @ matrix.inverse() @ rows.mT
    off, residuals = [], []
    for products in (0, 2, 4, 60):
        found = kfoc.influence(
            model, curvature, data, query, likelihood, damping=0.05, products=products, top=None
        )
        assert found.scores is not None
        off.append(((found.scores - expected).norm() / expected.norm()).item())
        if not products:
            assert found.residual is None
            continue
        assert found.residual is not None
        assert found.residual.shape == (3,)
        residuals.append(found.residual.max().item())
    assert off[3] < 1e-8 < off[2] < off[1] < off[0]
    assert residuals == sorted(residuals, reverse=True)


def test_fewer_samples_than_asked_for() -> None:
    model, data, curvature = problem()
    found = kfoc.influence(model, curvature, data[:1], data[1], top=100)
    assert found.helpful.indices.shape == found.harmful.indices.shape == (16, 16)
    assert torch.equal(found.helpful.indices, found.harmful.indices.flip(1))


def trained_to_the_end(
    model: nn.Module, x: Tensor, y: Tensor, weights: Tensor, steps: int = 60
) -> None:
    """Minimise `weights @ losses / N + DECAY / 2 |theta|^2` by L-BFGS."""
    parameters = list(model.parameters())
    optimizer = torch.optim.LBFGS(
        parameters,
        max_iter=steps,
        tolerance_grad=1e-9,
        tolerance_change=1e-15,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = weights @ losses("categorical", model(x), y) / len(x)
        loss = loss + DECAY / 2 * sum(p.square().sum() for p in parameters)
        loss.backward()
        return loss

    optimizer.step(closure)
    model.zero_grad(set_to_none=True)


# Correlations are 0.99 and 0.97 with the exact blocks, 0.82 and 0.85 with one product each.
NETWORKS = {
    "logistic regression": lambda: nn.Sequential(nn.Linear(6, 3)),
    "one hidden layer": lambda: nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)),
}
BOUNDS = [(kfoc.BlockDiagonal(), 0.95), (kfoc.KFOC(), 0.75)]


@pytest.mark.parametrize(("estimator", "bound"), BOUNDS)
@pytest.mark.parametrize("name", NETWORKS)
def test_agrees_with_retraining_without_the_sample(
    name: str, estimator: kfoc.Estimator, bound: float
) -> None:
    y = torch.randint(3, (60,))
    x = torch.randn(3, 6)[y] + torch.randn(60, 6)
    model = NETWORKS[name]()
    trained_to_the_end(model, x, y, torch.ones(60), 500)
    curvature = kfoc.fit(model, batches(x, y, 20), estimator=estimator, fisher="exact")
    query = torch.randn(4, 6), torch.arange(4) % 3
    found = kfoc.influence(
        model, curvature, batches(x, y, 20), query, damping=DECAY, top=None
    ).scores
    before = losses("categorical", model(query[0]), query[1]).detach()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    left_out = range(0, 60, 4)
    changes = []
    for n in left_out:
        model.load_state_dict(state)
        weights = torch.ones(60)
        weights[n] = 0
        trained_to_the_end(model, x, y, weights)
        changes.append(losses("categorical", model(query[0]), query[1]).detach() - before)
    predicted = -found[:, list(left_out)] / 60
    pair = torch.stack([predicted.flatten(), torch.stack(changes, 1).flatten()])
    assert torch.corrcoef(pair)[0, 1] > bound


def test_scores_are_derivatives_by_the_weight_of_a_sample() -> None:
    """Exactly, where the exact Fisher is the Hessian: in logistic regression."""
    x, y = torch.randn(40, 6), torch.randint(3, (40,))
    model = nn.Sequential(nn.Linear(6, 3))
    trained_to_the_end(model, x, y, torch.ones(40), 500)
    curvature = kfoc.fit(model, [(x, y)], estimator=kfoc.BlockDiagonal(), fisher="exact")
    query = torch.randn(4, 6), torch.arange(4) % 3
    found = kfoc.influence(model, curvature, [(x, y)], query, damping=DECAY, top=None).scores
    start = torch.cat([model[0].weight, model[0].bias[:, None]], 1).detach().flatten()

    def logits(theta: Tensor, inputs: Tensor) -> Tensor:
        return inputs @ theta.view(3, 7)[:, :6].mT + theta.view(3, 7)[:, 6]

    def best(weights: Tensor) -> Tensor:
        """By Newton's method, to rounding: L-BFGS stops where the loss no longer tells."""

        def objective(theta: Tensor) -> Tensor:
            loss = weights @ losses("categorical", logits(theta, x), y) / 40
            return loss + DECAY / 2 * theta.square().sum()

        theta = start
        for _ in range(4):
            gradient = torch.func.grad(objective)(theta)
            theta = theta - torch.linalg.solve(
                torch.func.jacrev(torch.func.grad(objective))(theta), gradient
            )
        return theta

    for n in (0, 7):
        step = 1e-3 * torch.eye(40)[n]
        ends = [
            losses("categorical", logits(best(torch.ones(40) + sign * step), query[0]), query[1])
            for sign in (-1, 1)
        ]
        derivative = (ends[1] - ends[0]) / 2e-3 * 40  # a weight of 1 is 1 / 40 of the mean
        torch.testing.assert_close(found[:, n], derivative, rtol=1e-5, atol=1e-6)


def test_bad_calls() -> None:
    model, data, curvature = problem()
    query = data[0]
    with pytest.raises(ValueError, match="top must be at least 1"):
        kfoc.influence(model, curvature, data, query, top=0)
    with pytest.raises(ValueError, match="data has no samples"):
        kfoc.influence(model, curvature, [], query)
    with pytest.raises(ValueError, match="data has no samples"):
        kfoc.self_influence(model, curvature, [])
    with pytest.raises(ValueError, match=r"batch 0 of data: .* needs integer class labels"):
        kfoc.self_influence(model, curvature, [(query[0], None)])
    with pytest.raises(ValueError, match="products must be at least 0"):
        kfoc.influence(model, curvature, data, query, products=-1)
    by_layer = dict.fromkeys(curvature, 0.1)
    with pytest.raises(ValueError, match="damping must be one number"):
        kfoc.influence(model, curvature, data, query, products=1, damping=by_layer)
    with pytest.raises(ValueError, match="data is an iterator"):
        kfoc.influence(model, curvature, iter(data), query, products=1)
    with pytest.raises(ValueError, match="needs integer class labels"):
        kfoc.influence(model, curvature, [(query[0], None)], query)
    with pytest.raises(ValueError, match=r"data must yield pairs \(inputs, targets\)"):
        kfoc.influence(model, curvature, data, query[0])
    with pytest.raises(ValueError, match="likelihood must be one of"):
        kfoc.influence(model, curvature, data, query, "poisson")
