"""What the study computes by itself: correlations, solves, responses, and who is ahead."""

from __future__ import annotations

import importlib
from types import ModuleType

import pytest
import torch
from torch import nn

from documents import ROOT


@pytest.fixture
def study(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """study/leaving_out.py, from which the others are reached."""
    monkeypatch.syspath_prepend(ROOT / "study")
    return importlib.import_module("leaving_out")


def softmax_regression() -> tuple[nn.Module, tuple[torch.Tensor, torch.Tensor]]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3))
    return model, (torch.randn(30, 4), torch.randint(3, (30,)))


def dense_fisher(model: nn.Module, inputs: torch.Tensor) -> torch.Tensor:
    """Of softmax regression, written out: means of `diag(p) - p p^T` times inputs and 1."""
    p = model(inputs).softmax(-1).detach()
    each = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    weight = torch.einsum("nab,ni,nj->aibj", each, inputs, inputs).reshape(12, 12)
    mixed = torch.einsum("nab,ni->aib", each, inputs).reshape(12, 3)
    return torch.cat([torch.cat([weight, mixed], 1), torch.cat([mixed.mT, each.sum(0)], 1)]) / len(
        inputs
    )


def test_true_fisher_and_solves_by_themselves(study: ModuleType) -> None:
    model, data = softmax_regression()
    fisher = study.TrueFisher(model, data)
    exact = dense_fisher(model, data[0])
    torch.testing.assert_close(fisher.matrix, exact)
    rows = fisher.gradients(data)[:5]
    solved = torch.linalg.solve(exact + 0.1 * torch.eye(15), rows.mT).mT
    *_, found = fisher.alone(rows, 0.1, lambda r: r / (exact.diagonal() + 0.1), 15)
    torch.testing.assert_close(found, solved)
    together = fisher.together(rows, 0.1, lambda r: r, 15)
    torch.testing.assert_close(together, solved)
    probabilities = model(data[0]).softmax(-1) - nn.functional.one_hot(data[1], 3)
    torch.testing.assert_close(rows[:, 12:], probabilities[:5].detach())


def test_responses_are_to_first_order_what_the_exact_solve_predicts(study: ModuleType) -> None:
    model, data = softmax_regression()

    def loss() -> torch.Tensor:
        penalty = sum(p.square().sum() for p in model.parameters())
        return study.sample_losses(model, data).mean() + study.DECAY / 2 * penalty

    study.minimise(list(model.parameters()), loss, 500, 1e-9)
    fisher, left_out = study.TrueFisher(model, data), torch.arange(6)
    gradients = fisher.gradients(data)
    predicted = gradients @ torch.linalg.solve(fisher.damped(study.DECAY), gradients[:6].mT) / 30
    for respond in (study.proximal, study.retrained):  # F is the Hessian of this model's loss
        actual = respond(fisher, data, data, left_out, 100)
        assert study.agreement(predicted, actual)["pearson"] > 0.98, respond
        assert 0.7 < study.agreement(predicted, actual)["scale"] < 1.3, respond


def test_agreement_of_ranks_is_a_query_at_a_time(study: ModuleType) -> None:
    actual = torch.tensor([[1.0, 2.0, 3.0], [300.0, 200.0, 100.0]])
    found = study.agreement(actual**3, actual)
    assert found["spearman"] == pytest.approx(1.0)
    assert 0.9 < found["pearson"] < 1.0
    assert study.agreement(-actual[:1], actual[:1]) == pytest.approx(
        {"pearson": -1.0, "spearman": -1.0, "scale": 1.0}
    )


def test_pruning_keeps_the_largest_and_what_is_no_matrix(study: ModuleType) -> None:
    kept = importlib.import_module("pruned").kept
    saliency = {"a": torch.tensor([[4.0, 1.0], [3.0, 2.0]]), "b": torch.tensor([0.0, 9.0])}
    mask = kept(saliency, 0.5)
    assert mask["a"].tolist() == [[1.0, 0.0], [1.0, 0.0]]
    assert mask["b"].tolist() == [1.0, 1.0]


def test_who_is_ahead(study: ModuleType) -> None:
    summary = importlib.import_module("summary")
    first = {("CNN", 0): 3.0, ("CNN", 1): 4.0, ("ResNet", 0): 5.0, ("ResNet", 1): 5.0}
    second = {("CNN", 0): 1.0, ("CNN", 1): 3.0, ("ResNet", 0): 5.5, ("MLP", 0): 0.0}
    measure = summary.Measure("", 1, {"K-FOC": first, "K-FAC": second})
    found = summary.compared(measure, ("K-FOC", "K-FAC"), "convolution")
    # CNN: 2 and 1; ResNet: -0.5, without an error of its own.
    assert found.ahead == pytest.approx((1.5 - 0.5) / 2)
    assert found.error == pytest.approx(0.5 / 2)
    assert (found.cases, found.networks) == ((2, 3), (1, 2))
    assert not found.told_apart
    worse = summary.compared(measure, ("K-FAC", "K-FOC"), "convolution")
    assert worse.ahead == -found.ahead
    assert summary.compared(measure, ("K-FOC", "K-FAC"), "no sharing") is None


def test_a_difference_has_as_many_decimals_as_its_error(study: ModuleType) -> None:
    shown = importlib.import_module("paired").with_error
    assert shown(0.1003, 0.0098) == "+0.100 ± 0.010"
    assert shown(-10.412, 0.621) == "-10.41 ± 0.62"
    assert shown(-2.4e-5, 5.5e-5) == "-0.00002 ± 0.00006"
    assert shown(-2e-7, 0.00075) == "+0.0000 ± 0.0008"
    assert shown(0.0, 0.0) == "+0.000 ± 0.000"
    assert shown(12.34, 34.5) == "+12 ± 34"
    assert shown(0.25, float("nan")) == "+0.250"
