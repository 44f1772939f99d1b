"""Cotangents of logits, `e_c - p` with p their softmax, to all digits for sure models too."""

from __future__ import annotations

import torch
from torch import Tensor

# Numbers of logits that are drawn for at once: few enough for what is made of them, in float64, to
# stay in the cache. For a vocabulary all of it would be several times the model's outputs.
CHUNK = 2**18


def residuals(p: Tensor, labels: Tensor) -> Tensor:
    """e_c - p (..., C) at the labels c (..., 1); its 1 - p_c, as a sum, keeps its digits."""
    others = p.scatter(-1, labels, 0)
    return others.neg().scatter_(-1, labels, others.sum(-1, keepdim=True))


def drawn_by_weight(logits: Tensor, points: Tensor, signs: Tensor) -> Tensor:
    """`s r / |r| sqrt(1 - |p|^2)` with r = e_c - p, the class c drawn by p_c |r|^2.

    Args:
        logits: (M, C).
        points: (M,), uniform in (0, 1], that draw the classes.
        signs: (M,), s, with what each row is to be multiplied by.

    Returns:
        (M, C), in the dtype of the logits.
    """
    found = torch.empty_like(logits, memory_format=torch.contiguous_format)
    step = max(1, CHUNK // logits.shape[1])
    each = (part.split(step) for part in (found, logits, points, signs))
    for part, *rows in zip(*each, strict=True):
        part.copy_(_drawn(*rows))
    return found


def _drawn(logits: Tensor, points: Tensor, signs: Tensor) -> Tensor:
    p = logits.double().softmax(-1)
    likeliest, top = p.max(-1, keepdim=True)
    others = p.scatter(-1, top, 0)
    # 1 - p of the likeliest class and what follows from it as sums: 1 - p loses all digits.
    rest, squares = others.sum(-1, keepdim=True), others.square_().sum(-1, keepdim=True)
    norms = torch.sub(1 + likeliest.square() + squares, p, alpha=2)  # |e_c - p|^2
    norms.scatter_(-1, top, rest.square() + squares)
    size = rest * (1 + likeliest) - squares  # 1 - |p|^2
    cumulative = norms.mul_(p).cumsum_(-1)
    labels = torch.searchsorted(cumulative, points[:, None] * cumulative[:, -1:])
    cotangent = residuals(p, labels)
    length = cotangent.norm(dim=-1, keepdim=True)
    # Where p is one-hot both may be zero, and there is nothing to draw.
    tiny = torch.finfo(p.dtype).tiny
    return cotangent.mul_(size.sqrt() / length.clamp_min(tiny) * signs[:, None])
