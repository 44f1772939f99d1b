"""What docs/design.md says how to add, added, each in a file of its own."""

from __future__ import annotations

import pytest
import torch

import kfoc
import oracle
from kfoc.estimators.kfoc import AGGREGATIONS
from kfoc.fitting.task import Task
from kfoc.plans.choose import PLANS, choose
from kfoc.plans.cost import Size
from models import batches, convolutional, images
from own_aggregation import Newest
from own_plan import OneByOne
from own_runner import UntilSteady

LAYERS = ("0", "3", "5")


def optimum(model: torch.nn.Module, layer: str, x: torch.Tensor) -> torch.Tensor:
    cotangents = oracle.categorical_exact(model(x).detach())
    fisher = oracle.fisher_block(model, layer, x, cotangents)
    best, _, _ = oracle.optimum(fisher, *shape_of(model, layer))
    return best


def shape_of(model: torch.nn.Module, layer: str) -> tuple[int, int]:
    weight = model.get_submodule(layer).weight
    return len(weight), weight[0].numel() + 1


def assert_is(block: kfoc.Block, expected: torch.Tensor) -> None:
    scale = expected.abs().max().item()
    torch.testing.assert_close(block.to_dense(), expected, rtol=0, atol=1e-7 * scale)


def test_an_aggregation_of_ones_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(AGGREGATIONS, "newest", Newest)
    model, (x, y) = convolutional(), images(20)
    estimator = kfoc.KFOC("newest", rtol=1e-14)
    found = kfoc.fit(model, batches(x, y, 8), fisher="exact", estimator=estimator)
    for layer in LAYERS:
        assert_is(found[layer], optimum(model, layer, x[16:]))
    with pytest.raises(ValueError, match="decay must"):
        kfoc.KFOC("newest", decay=0.5).check()


def test_a_plan_of_ones_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PLANS, OneByOne.plan, OneByOne)
    model, (x, y) = convolutional(), images(20)
    estimator = kfoc.KFOC(plan=OneByOne.plan, rtol=1e-14)
    found = kfoc.fit(model, [(x, y)], fisher="exact", estimator=estimator)
    for layer in LAYERS:
        assert found[layer].report.plan == OneByOne.plan
        assert_is(found[layer], optimum(model, layer, x))
    # And the planner takes it where it is the cheapest.
    assert choose(Size(1, 1, 64, 12, 10), 2**30, 8) == OneByOne.plan
    assert choose(Size(1, 2, 64, 12, 10), 2**30, 8) != OneByOne.plan


def test_a_way_to_run_of_ones_own() -> None:
    model, (x, y) = convolutional(), images(60)
    options = (kfoc.KFAC(), "exact", 1, None, None, 0, 0, True)
    task = Task.checked(model, "categorical", *options)
    found = UntilSteady(0.2).run(task, batches(x, y, 6), None)
    assert 6 < found.num_samples < 60
    seen = x[: found.num_samples]
    expected = kfoc.fit(model, [(seen, None)], fisher="exact", estimator=kfoc.KFAC())
    for layer in LAYERS:
        assert_is(found[layer], expected[layer].to_dense())
