"""Prior precisions as users give them, and as scalars by layer."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from kfoc.curvature.damped import check_layers

Number = float | Tensor
Precisions = Number | Mapping[str, Number]


def precisions(layers: tuple[str, ...], value: Precisions) -> dict[str, Tensor]:
    """Layer name -> its precision, from one for all or one for each; gradients flow through.

    Raises:
        ValueError: layers that are missing or unknown, or a number that makes no sense.
    """
    if not isinstance(value, Mapping):
        return dict.fromkeys(layers, positive("prior_precision", value))
    check_layers("prior_precision", layers, value)
    return {k: positive(f"prior_precision of layer {k!r}", value[k]) for k in layers}


def positive(what: str, value: Number) -> Tensor:
    """A scalar in float64 on the CPU, that gradients flow through.

    Raises:
        ValueError: anything but one finite positive number.
    """
    try:
        if isinstance(value, (bool, complex)):
            raise TypeError
        # Numbers at once in float64, not by way of the default dtype.
        found = torch.as_tensor(value, dtype=torch.float64, device="cpu")
    except (TypeError, RuntimeError):
        raise ValueError(f"{what} must be a number, found {value!r}") from None
    if found.numel() != 1 or not 0 < found.item() < math.inf:
        raise ValueError(f"{what} must be one finite and positive number, found {value}")
    return found.reshape(())
