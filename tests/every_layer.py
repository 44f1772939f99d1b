"""Every block of a model against every sample run by itself."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import kfoc
import oracle


def check_every_block(
    model: nn.Module,
    *inputs: Tensor,
    skipped: frozenset[str] = frozenset(),
    size: int = 3,
    layers: list[str] | None = None,
) -> kfoc.Curvature:
    """Exact blocks and optima of all layers, which hold all trained parameters but `skipped`'s.

    Args:
        inputs: the model's arguments, samples first.
        skipped: parameters that must have no block.
        layers: as for `kfoc.fit`.
        size: samples in a batch of the exact blocks' fit; the optima come from a single batch.
    """
    cotangents = oracle.gaussian_exact(model(*inputs).detach())
    options: dict = {"likelihood": "gaussian", "fisher": "exact", "layers": layers}
    split = zip(*(x.split(size) for x in inputs), strict=True)
    data = [(part, None) for part in split]
    exact = kfoc.fit(model, data, estimator=kfoc.BlockDiagonal(), **options)
    covered = [name for names in exact.parameters.values() for name in names]
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert len(covered) == len(set(covered))
    assert set(covered) == trained - skipped
    optimal = kfoc.fit(model, [(inputs, None)], estimator=kfoc.KFOC(rtol=0), **options)
    for layer, block in exact.items():
        layout = exact.layouts[layer]
        gradients = oracle.gradients_alone(model, layout.names, inputs, cotangents)
        expected = oracle.fisher_of(gradients, layout.kind)
        assert expected.any(), layer
        scale = expected.abs().max().item()
        torch.testing.assert_close(block.to_dense(), expected, rtol=1e-9, atol=1e-10 * scale)
        check_optimum(optimal[layer], expected)
    return exact


def check_optimum(block: kfoc.Block, expected: Tensor) -> None:
    """A block of K-FOC against the exact one: the optimum of its structure."""
    if isinstance(block, kfoc.KroneckerBlock):
        error = oracle.optimum(expected, *block.shape)[2]
        assert oracle.relative_error(expected, block.to_dense()) == pytest.approx(error, rel=1e-7)
    elif isinstance(block, kfoc.GroupedBlock):
        start = 0
        for part in block.blocks:
            stop = start + part.shape[0] * part.shape[1]
            check_optimum(part, expected[start:stop, start:stop])
            start = stop
    else:
        torch.testing.assert_close(block.to_dense(), expected)
