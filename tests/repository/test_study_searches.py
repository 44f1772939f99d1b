"""How the study chooses settings, and the curvatures that it gives another's size."""

from __future__ import annotations

import importlib
from types import ModuleType

import pytest
import torch
from torch import nn

import kfoc
from documents import ROOT


@pytest.fixture
def search(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(ROOT / "study")
    return importlib.import_module("search")


def valley(point: tuple[int, ...]) -> tuple[float, float]:
    """Two scores, with their lowest at (3, -2) and at (-1, 0)."""
    x, y = point
    return (x - 3) ** 2 + (y + 2) ** 2, (x + 1) ** 2 + y**2


def test_search_goes_on_until_the_best_by_both_scores_has_neighbours(search: ModuleType) -> None:
    tried = search.search(valley, 2, 5, 60)
    assert search.best(tried) == [(3, -2), (-1, 0)]
    assert all(search.inside(point, tried) for point in search.best(tried))
    assert len(tried) < 30


def test_search_tries_at_least_and_at_most_so_many(search: ModuleType) -> None:
    assert len(search.search(valley, 2, 40, 60)) == 40
    few = search.search(valley, 2, 5, 7)
    assert len(few) == 7
    assert not search.inside(search.best(few)[0], few)
    assert search.Axis("lr", 1e-2, 10.0).at(-2) == 1e-4


@pytest.mark.parametrize("streaming", [False, True])
def test_rescaled_blocks_keep_their_shape_and_have_the_trace_of_f(
    search: ModuleType, streaming: bool
) -> None:
    rescaled = importlib.import_module("rescaled").Rescaled(kfoc.KFAC(), kfoc.Diagonal())
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.Tanh(), nn.Flatten(), nn.Linear(12, 4))
    batches, decay = torch.randn(3, 20, 1, 4, 4), 0.5 if streaming else 1.0

    def fitted(estimator: kfoc.Estimator) -> kfoc.Curvature:
        tracker = kfoc.Tracker(model, estimator=estimator, decay=decay, fisher="exact")
        for batch in batches:
            tracker.update(batch)
        return tracker.curvature()

    found, plain, exact = map(fitted, (rescaled, kfoc.KFAC(), kfoc.BlockDiagonal()))
    for layer in found:
        trace = exact[layer].trace()
        assert found[layer].trace() == pytest.approx(trace)
        assert abs(plain[layer].trace() / trace - 1) > 1e-3
        shape = plain[layer].to_dense() * (trace / plain[layer].trace())
        torch.testing.assert_close(found[layer].to_dense(), shape)
