"""Layers of the transformers library, which is not imported: they are known by their names."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor, nn
from torch.nn import functional

from kfoc.layers.rule import (
    BY_NAME,
    Treatment,
    Unsupported,
    trained_parameters,
    treatment,
    unused,
)


def _conv1d(module: nn.Module) -> Treatment:
    """GPT-2's linear layer, whose weight (in, out) has the inputs first."""
    return replace(treatment.dispatch(nn.Linear)(module), layout="columns")


def _rms_norm(module: Any) -> Treatment:
    """The scale at the end of a root-mean-square normalisation, computed in float32.

    Every model has a class of its own for it; what such a class computes is seen by `proof`.
    """
    eps = getattr(module, "variance_epsilon", None) or getattr(module, "eps", None)
    if eps is None or set(trained_parameters(module)) != {"weight"} or module.weight.ndim != 1:
        raise Unsupported(f"no treatment for {type(module).__name__} layers")
    size = list(module.weight.shape)

    def direct(value: Tensor, grad: Tensor) -> Tensor:
        terms = grad * functional.rms_norm(value, size, eps=eps)
        return terms.reshape(len(terms), -1, size[0]).sum(1)[..., None]

    names = ("weight",)
    return Treatment(unused, unused, names, layout="stacked", direct=direct, features=(1, 1))


BY_NAME["transformers.pytorch_utils.Conv1D"] = _conv1d
BY_NAME["transformers.*RMSNorm"] = _rms_norm
