"""A fitted curvature's operations against plain autograd, through every layout."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import kfoc


class Model(nn.Module):
    """A layer of each layout and kind of sample."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 2)
        self.up = nn.ConvTranspose2d(4, 6, 2, groups=2, stride=2)
        self.norm = nn.GroupNorm(2, 6)
        self.grouped = nn.Conv2d(6, 4, 3, groups=2, bias=False)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.norm(self.up(torch.tanh(self.conv(x)))))
        return self.head(torch.tanh(self.grouped(x)).mean((2, 3)))


def gradients(model: nn.Module, x: Tensor) -> list[dict[str, Tensor]]:
    """Of each output of each sample, one backward pass each."""
    names, parameters = zip(*model.named_parameters(), strict=True)
    return [
        dict(zip(names, torch.autograd.grad(output, parameters, retain_graph=True), strict=True))
        for output in model(x).flatten()
    ]


def random(model: nn.Module, *lead: int) -> dict[str, Tensor]:
    return {name: torch.randn(*lead, *p.shape) for name, p in model.named_parameters()}


OPTIONS: dict = {"likelihood": "gaussian", "fisher": "exact"}


def test_exact_blocks_are_means_over_gradients() -> None:
    model, x = Model(), torch.randn(6, 2, 4, 4)
    curvature = kfoc.fit(model, [(x, None)], estimator=kfoc.BlockDiagonal(), **OPTIONS)
    v = random(model)
    product = curvature.matvec(v)
    assert product.keys() == v.keys()
    form = 0.0
    for names in curvature.parameters.values():
        expected = {name: torch.zeros_like(v[name]) for name in names}
        for gradient in gradients(model, x):
            along = sum((gradient[name] * v[name]).sum() for name in names)
            form += along**2 / len(x)
            for name in names:
                expected[name] += along * gradient[name] / len(x)
        for name in names:
            torch.testing.assert_close(product[name], expected[name])
    torch.testing.assert_close(curvature.quadratic_form(v), form)
    trace = sum(t.square().sum() for g in gradients(model, x) for t in g.values()) / len(x)
    assert curvature.trace() == pytest.approx(trace.item())


ESTIMATORS = [
    kfoc.KFOC(),
    kfoc.KFAC(),
    kfoc.Diagonal(),
    kfoc.BlockDiagonal(),
    kfoc.EigenCorrected(kfoc.KFAC()),
    kfoc.KFOC(rank=2),
]


@pytest.mark.parametrize("estimator", ESTIMATORS, ids=lambda e: repr(e).split("(")[0])
def test_solves_undo_products(estimator: kfoc.Estimator) -> None:
    model, x = Model(), torch.randn(6, 2, 4, 4)
    curvature = kfoc.fit(
        model, [(part, None) for part in x.split(2)], estimator=estimator, **OPTIONS
    )
    assert curvature.estimator == repr(estimator)
    assert (curvature.fisher, curvature.seed) == ("exact", 0)
    v = random(model, 2)
    solved = curvature.solve(v, damping=2.0)
    again = curvature.matvec(solved)
    for name in v:
        torch.testing.assert_close(again[name] + 2.0 * solved[name], v[name])
    damped = curvature.damped(2.0)
    twice = damped.sqrt_matvec(damped.sqrt_matvec(solved))
    for name in v:
        torch.testing.assert_close(twice[name], v[name])


def test_natural_gradient_of_a_linear_model_is_newtons_step() -> None:
    """Least squares on a linear layer: F is the Hessian of half the mean squared error."""
    model, x, y = nn.Linear(4, 3), torch.randn(50, 4), torch.randn(50, 3)
    curvature = kfoc.fit(model, [(x, None)], **OPTIONS)
    loss = (model(x) - y).square().sum() / 2 / len(x)
    names, parameters = zip(*model.named_parameters(), strict=True)
    gradient = dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))
    step = curvature.solve(gradient, damping=0.0)
    ones = torch.cat([x, torch.ones(50, 1)], 1)
    best = torch.linalg.lstsq(ones, y).solution.mT
    found = torch.cat(
        [model.weight - step["weight"], (model.bias - step["bias"])[:, None]], 1
    ).detach()
    torch.testing.assert_close(found, best)


def test_the_root_of_a_singular_curvature_needs_no_damping() -> None:
    model, x = nn.Linear(6, 4), torch.randn(3, 6)
    curvature = kfoc.fit(model, [(x, None)], **OPTIONS)
    v = random(model)
    twice = curvature.sqrt_matvec(curvature.sqrt_matvec(v))
    for name, expected in curvature.matvec(v).items():
        torch.testing.assert_close(twice[name], expected)
    with pytest.raises(ValueError, match="layer '': the block is singular"):
        curvature.solve(v, damping=0.0)
