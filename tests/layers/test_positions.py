"""Embeddings of positions, called with one row of ids for all samples."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import kfoc
from every_layer import check_every_block
from kfoc.fitting import reader
from kfoc.layers import selection


class Language(nn.Module):
    """As GPT-2 has it: tokens and positions are embedded, and added."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.tokens, self.positions = nn.Embedding(7, 4), nn.Embedding(6, 4)
        self.drop = nn.Dropout(0.5 if how == "dropout" else 0.0)
        self.mix, self.head = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, ids: Tensor) -> Tensor:
        if self.how == "checkpointed":
            return self.head(checkpoint(self.body, ids, use_reentrant=False))
        return self.head(self.body(ids))

    def body(self, ids: Tensor) -> Tensor:
        places = self.positions(torch.arange(ids.shape[1])[None])
        if self.how == "first row":
            places = places[0]
        elif self.how == "one row":
            assert places.shape[0] == 1
        return torch.tanh(self.mix(self.tokens(ids) + self.drop(places)))


@pytest.fixture(autouse=True)
def large(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every embedding is too large for per-sample gradients one by one."""
    for module in (reader, selection):
        monkeypatch.setattr(module, "LOOSE_LIMIT", 8)


@pytest.mark.parametrize("how", ["plain", "checkpointed"])
@pytest.mark.parametrize("count", [6, 7])  # whose last batch has one sample
def test_positions_are_treated(how: str, count: int) -> None:
    model = Language(how).eval()
    found = check_every_block(model, torch.randint(7, (count, 5)))
    assert found.layouts["positions"].names == ("positions.weight",)
    assert "positions" in found.parameters


@pytest.mark.parametrize("how", ["first row", "dropout", "one row"])
def test_models_that_mean_one_row_are_left_alone(how: str) -> None:
    """As it is used for all samples, or draws for each, it has no derivatives by sample."""
    model = Language(how)
    ids = torch.randint(7, (6, 5))
    options: dict = {"likelihood": "gaussian", "fisher": "exact", "estimator": kfoc.KFAC()}
    found = kfoc.fit(model, [(ids, None)], **options)
    assert set(found) == {"tokens", "mix", "head"}
    assert "positions" in found.skipped
    model.positions.requires_grad_(False)
    expected = kfoc.fit(model, [(ids, None)], **options)
    for layer, block in expected.items():
        torch.testing.assert_close(found[layer].to_dense(), block.to_dense())


def test_a_tracker_and_several_passes_and_batches() -> None:
    model = Language("plain")
    data = [(part, None) for part in torch.randint(7, (8, 5)).split(4)]
    options: dict = {"likelihood": "gaussian", "fisher": "exact"}
    everything = [(torch.cat([x for x, _ in data]), None)]
    whole = kfoc.fit(model, everything, estimator=kfoc.KFOC(rtol=1e-14), **options)
    exact = kfoc.KFOC("exact", rtol=1e-14, passes=400, buffer=0)
    found = kfoc.fit(model, data, estimator=exact, **options)["positions"]
    scale = whole["positions"].to_dense().abs().max().item()
    torch.testing.assert_close(
        found.to_dense(), whole["positions"].to_dense(), rtol=0, atol=1e-6 * scale
    )
    tracker = kfoc.Tracker(model, estimator=kfoc.KFAC(), **options)
    for x, _ in data:
        tracker.update(x)
    expected = kfoc.fit(model, data, estimator=kfoc.KFAC(), **options)
    for layer, block in tracker.curvature().items():
        torch.testing.assert_close(block.to_dense(), expected[layer].to_dense())
