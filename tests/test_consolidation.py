"""The penalty of elastic weight consolidation against dense quadratics."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import kfoc
from models import Data, batches, convolutional, images

ESTIMATORS = {
    "K-FOC": kfoc.KFOC(),
    "K-FAC": kfoc.KFAC(),
    "diagonal": kfoc.Diagonal(),
    "EK-FOC": kfoc.EigenCorrected(),
}
LAYERS = ("0", "3", "5")


def flat(model: nn.Module, what: str = "data") -> Tensor:
    """All parameters, or their gradients, layer by layer as [W | b]."""
    parts = []
    for layer in LAYERS:
        module = model.get_submodule(layer)
        pair = [module.weight, module.bias]
        pair = [p.grad for p in pair] if what == "grad" else [p.detach() for p in pair]
        parts.append(torch.cat([pair[0].flatten(1), pair[1][:, None]], 1).flatten().clone())
    return torch.cat(parts)


def dense(curvature: kfoc.Curvature) -> Tensor:
    return torch.block_diag(*[block.to_dense() for block in curvature.values()])


def move(model: nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))


def task(count: int) -> Data:
    return batches(*images(count), 5)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_each_task_has_its_own_quadratic(name: str) -> None:
    model = convolutional()
    consolidation = kfoc.Consolidation(strength=0.3, anchors="each")
    terms = []
    for count in (10, 20):
        curvature = kfoc.fit(model, task(count), estimator=ESTIMATORS[name])
        consolidation.add(model, curvature)
        terms.append((flat(model), count * dense(curvature)))
        move(model)
    penalty = consolidation.penalty(model)
    penalty.backward()
    apart = [flat(model) - anchor for anchor, _ in terms]
    expected = sum(0.15 * d @ f @ d for d, (_, f) in zip(apart, terms, strict=True))
    torch.testing.assert_close(penalty.detach(), expected, rtol=1e-9, atol=0.0)
    gradient = sum(0.3 * f @ d for d, (_, f) in zip(apart, terms, strict=True))
    torch.testing.assert_close(flat(model, "grad"), gradient, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("name", ["K-FOC", "K-FAC", "diagonal"])
def test_the_latest_anchor_has_the_sum_of_the_curvatures(name: str) -> None:
    model = convolutional()
    consolidation = kfoc.Consolidation(anchors="latest")
    curvatures = []
    for count in (10, 20):
        move(model)
        curvatures.append(kfoc.fit(model, task(count), estimator=ESTIMATORS[name]))
        consolidation.add(model, curvatures[-1])
    anchor = flat(model)
    move(model)
    penalty = consolidation.penalty(model)
    penalty.backward()
    both = 30 * dense(curvatures[0] + curvatures[1])
    if name == "diagonal":  # sums of diagonals are exact
        both = 10 * dense(curvatures[0]) + 20 * dense(curvatures[1])
    apart = flat(model) - anchor
    torch.testing.assert_close(penalty.detach(), 0.5 * apart @ both @ apart, rtol=1e-9, atol=0.0)
    torch.testing.assert_close(flat(model, "grad"), both @ apart, rtol=1e-8, atol=1e-12)


def test_there_is_no_penalty_before_the_first_task_nor_at_an_anchor() -> None:
    model = convolutional()
    consolidation = kfoc.Consolidation()
    assert consolidation.penalty(model).item() == 0
    consolidation.add(model, kfoc.fit(model, task(10)))
    assert consolidation.penalty(model).item() == 0
    move(model)
    assert consolidation.penalty(model).item() > 0


@pytest.mark.parametrize("anchors", ["latest", "each"])
def test_saved_and_loaded(anchors: str, tmp_path: Path) -> None:
    model = convolutional()
    consolidation = kfoc.Consolidation(0.7, anchors)
    for _ in range(2):
        consolidation.add(model, kfoc.fit(model, task(10)))
        move(model)
    consolidation.save(tmp_path / "tasks")
    consolidation.save(tmp_path / "tasks")
    again = kfoc.Consolidation.load(tmp_path / "tasks")
    assert again.anchors == anchors
    assert torch.equal(again.penalty(model), consolidation.penalty(model))
    again.add(model, kfoc.fit(model, task(10)))
    (tmp_path / "tasks" / "0.anchor.safetensors").unlink()
    with pytest.raises(FileNotFoundError):
        kfoc.Consolidation.load(tmp_path / "tasks")


def test_errors_name_what_to_do() -> None:
    model = convolutional()
    with pytest.raises(ValueError, match="anchors must be one of latest, each"):
        kfoc.Consolidation(anchors="first")
    with pytest.raises(ValueError, match="strength"):
        kfoc.Consolidation(-1.0)
    curvature = kfoc.fit(model, task(10))
    with pytest.raises(ValueError, match="does not have"):
        kfoc.Consolidation().add(nn.Linear(3, 2), curvature)
    consolidation = kfoc.Consolidation()
    for _ in range(2):
        move(model)
        eigen = kfoc.fit(model, task(10), estimator=kfoc.EigenCorrected())
        if consolidation.tasks:
            with pytest.raises(ValueError, match="different eigenbases"):
                consolidation.add(model, eigen)
            assert len(consolidation.tasks) == 1
        else:
            consolidation.add(model, eigen)
