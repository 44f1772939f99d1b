"""What docs/coming_from.md says of the scales of curvlinops, where it is installed."""

from __future__ import annotations

import re
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import kfoc
from documents import ROOT

with warnings.catch_warnings():  # of the package's own
    warnings.simplefilter("ignore")
    curvlinops = pytest.importorskip("curvlinops")

pytestmark = pytest.mark.filterwarnings("ignore")  # of the package, and of what it calls
SAMPLES, OUTPUTS, LABELS = 12, 3, 4
TARGETS = {
    "CrossEntropyLoss": ("categorical", lambda: torch.randint(OUTPUTS, (SAMPLES,))),
    "BCEWithLogitsLoss": ("bernoulli", lambda: torch.randint(2, (SAMPLES, OUTPUTS)).double()),
    "MSELoss": ("gaussian", lambda: torch.randn(SAMPLES, OUTPUTS)),
}
FACTORS = {"1": 1.0, "N": SAMPLES, "2 N": 2 * SAMPLES, "4 N": 4 * SAMPLES}
FACTORS |= {f"{k} / C": k / OUTPUTS for k in (1, 2, 4)}


def of_the_page(loss: str) -> list[float]:
    """The factors of a row: mean exact, mean empirical, sum exact, sum empirical."""
    page = (ROOT / "docs" / "coming_from.md").read_text()
    (row,) = re.findall(rf"^\| `{loss}` \|(.*)\|$", page, re.M)
    return [FACTORS[cell.strip()] for cell in row.split("|")]


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, OUTPUTS))


def dense(operator: Any) -> Tensor:
    return operator @ torch.eye(operator.shape[0])


def ours(curvature: kfoc.Curvature, model: nn.Module) -> Tensor:
    identity = torch.eye(sum(p.numel() for p in model.parameters()))
    products = [curvature.flatten(curvature.matvec(curvature.unflatten(e))) for e in identity]
    return torch.stack(products, 1)


@pytest.mark.parametrize("loss", TARGETS)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("fisher", ["exact", "empirical"])
def test_the_table_of_scales(loss: str, reduction: str, fisher: str) -> None:
    likelihood, targets = TARGETS[loss]
    factor = of_the_page(loss)[2 * (reduction == "sum") + (fisher == "empirical")]
    model, x, y = network(), torch.randn(SAMPLES, 4), targets()
    data = [(x[:5], y[:5]), (x[5:], y[5:])]
    options = {"fisher_type": {"exact": "type-2"}.get(fisher, fisher)}
    options["separate_weight_and_bias"] = False
    arguments = model, getattr(nn, loss)(reduction=reduction), list(model.parameters()), data
    for theirs, estimator in (
        (curvlinops.KFACLinearOperator, kfoc.KFAC()),
        (curvlinops.EKFACLinearOperator, kfoc.EigenCorrected(kfoc.KFAC())),
    ):
        found = kfoc.fit(model, data, likelihood, fisher=fisher, estimator=estimator)
        torch.testing.assert_close(
            dense(theirs(*arguments, **options)), factor * ours(found, model)
        )
    kind = {"exact": "GGNLinearOperator", "empirical": "EFLinearOperator"}[fisher]
    blocks = kfoc.fit(model, data, likelihood, fisher=fisher, estimator=kfoc.BlockDiagonal())
    whole = dense(getattr(curvlinops, kind)(*arguments))
    first = 25  # parameters of the first layer
    whole[:first, first:] = whole[first:, :first] = 0.0
    torch.testing.assert_close(whole, factor * ours(blocks, model))


class Positions(nn.Module):
    """Labels of positions that do not see each other, in the order that the loss takes them."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x).transpose(1, 2)


def test_sequences() -> None:
    model, x = network(), torch.randn(SAMPLES, LABELS, 4)
    y = torch.randint(OUTPUTS, (SAMPLES, LABELS))
    arguments = Positions(model), nn.CrossEntropyLoss(), list(model.parameters()), [(x, y)]
    folded = [(x.flatten(0, 1), y.flatten())]
    blocks = {"estimator": kfoc.BlockDiagonal(), "fisher": "empirical"}
    expected = dense(curvlinops.EFLinearOperator(*arguments))
    expected[:25, 25:] = expected[25:, :25] = 0.0
    torch.testing.assert_close(ours(kfoc.fit(model, folded, **blocks), model), expected)
    whole = ours(kfoc.fit(model, [(x, y)], **blocks), model)
    factor = (whole * expected).sum() / expected.square().sum()
    assert (whole - factor * expected).norm() > 0.1 * whole.norm()  # another matrix
    for kind, fisher in (("type-2", "exact"), ("empirical", "empirical")):
        theirs = curvlinops.KFACLinearOperator(
            *arguments, fisher_type=kind, separate_weight_and_bias=False
        )
        found = kfoc.fit(model, [(x, y)], fisher=fisher, estimator=kfoc.KFAC())
        torch.testing.assert_close(dense(theirs), ours(found, model) / LABELS)
