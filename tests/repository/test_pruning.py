"""examples/pruning.py runs, and its adjustment is the one that dense algebra gives."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch

import kfoc
from documents import script


@pytest.fixture(scope="module")
def pruning() -> ModuleType:
    return script("examples/pruning.py")


def test_the_rest_is_moved_to_the_least_of_the_quadratic(
    pruning: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pruning, "DAMPING", 0.1)
    model = torch.nn.Sequential(torch.nn.Linear(5, 4), torch.nn.Tanh(), torch.nn.Linear(4, 3))
    data = [(torch.randn(40, 5), None)]
    curvature = kfoc.fit(model, data, fisher="exact", estimator=kfoc.BlockDiagonal())
    weights = curvature.vector(model)
    mask = pruning.kept(pruning.saliencies(weights, {"": curvature})["OBS, "], 0.5)
    found = curvature.flatten(pruning.adjusted(weights, mask, curvature, 0.1))
    dense = torch.block_diag(*[block.to_dense() for block in curvature.values()])
    order = curvature.flatten(curvature.unflatten(torch.arange(39.0)))
    assert torch.equal(order, torch.arange(39.0))
    places = torch.cat(
        [
            curvature.layouts[layer].join(curvature.unflatten(torch.arange(39.0))).flatten()
            for layer in curvature
        ]
    ).long()
    hessian = torch.empty(39, 39)
    hessian[places[:, None], places] = dense + 0.1 * torch.eye(39)
    flat, stays = curvature.flatten(weights), curvature.flatten(mask).bool()
    assert 10 < (~stays).sum() < 20
    change = -torch.linalg.solve(
        hessian[stays][:, stays], hessian[stays][:, ~stays] @ -flat[~stays]
    )
    assert not found[~stays].any()
    torch.testing.assert_close(found[stays], flat[stays] + change, rtol=1e-4, atol=1e-5)


def test_the_example_runs(pruning: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("sklearn")
    torch.set_default_dtype(torch.float32)
    found = pruning.main(1, 15, {"K-FAC": kfoc.KFAC()})
    assert list(found) == [
        "dense",
        "magnitude",
        "OBD, K-FAC",
        "OBS, K-FAC",
        "OBS, K-FAC, adjusted",
    ]
    assert found["OBS, K-FAC, adjusted"][2] > found["magnitude"][2]
    assert "accuracy at sparsity" in capsys.readouterr().out
