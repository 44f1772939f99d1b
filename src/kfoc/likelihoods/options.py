"""Options of likelihoods that are numbers or tensors, as PyTorch's losses have them."""

from __future__ import annotations

import torch
from torch import Tensor


def tensor_option(likelihood: str, name: str, value: object, *, positive: bool = False) -> Tensor:
    """A copy of the caller's number, numbers or tensor, which a later change of it does not reach.

    Raises:
        ValueError: something else, values that are not finite, negative ones, or zeros where they
            must be positive.
    """
    try:
        if isinstance(value, Tensor):
            found = value.detach().clone()
        else:
            found = torch.tensor(value, dtype=torch.float64, device="cpu")
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(f"{name} of {likelihood} must be numbers, found {value!r}") from None
    wrong = ~found.isfinite() | (found <= 0 if positive else found < 0)
    if found.is_complex() or wrong.any():
        least = "positive" if positive else "not negative"
        raise ValueError(f"{name} of {likelihood} must be finite and {least}, found {value!r}")
    return found


def check_broadcast(likelihood: str, name: str, value: Tensor, outputs: Tensor) -> None:
    """Raise where it does not broadcast to the outputs of one sample.

    PyTorch's losses take a dimension of samples too, which would be another batch's.
    """
    one = outputs.shape[1:]
    try:
        fits = torch.broadcast_shapes(value.shape, one) == one
    except RuntimeError:
        fits = False
    if not fits:
        raise ValueError(
            f"{name} of {likelihood} has the shape {tuple(value.shape)}, which does not broadcast "
            f"to the outputs of one sample, {tuple(one)}"
        )
