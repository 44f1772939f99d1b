"""Layers of the transformers library, which is not imported: they are known by their names."""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from kfoc.layers import BY_NAME, Treatment, treatment


def _conv1d(module: nn.Module) -> Treatment:
    """GPT-2's linear layer, whose weight (in, out) has the inputs first."""
    return replace(treatment.dispatch(nn.Linear)(module), layout="columns")


BY_NAME["transformers.pytorch_utils.Conv1D"] = _conv1d
