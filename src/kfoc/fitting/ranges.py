"""Whether blocks are within the range of their dtype."""

from __future__ import annotations

import math

import torch

from kfoc.blocks import Block, GroupedBlock, KroneckerBlock
from kfoc.errors import naming
from kfoc.linalg.scaling import beyond, check_representable, magnitude


def _largest(block: Block) -> list[float]:
    """The largest numbers of a block's parts, of which it is the product; not finite where one is
    not. Those of a semi-definite factor are bounded by its diagonal, and to look at all of them
    would take as long as a small fit."""
    if isinstance(block, GroupedBlock):
        each = zip(*map(_largest, block.blocks), strict=True)
        return [sum(part) if not math.isfinite(sum(part)) else max(part) for part in each]
    if isinstance(block, KroneckerBlock):
        factors = block.left, block.right
        return [magnitude(f.diagonal() if f.ndim == 2 else f) for f in factors]
    return [magnitude(tensor) for tensor in block.tensors()]


def check_range(name: str, block: Block, scales: tuple[float, float]) -> None:
    """Inputs and gradients were finite, so what is not is a block beyond the range of its dtype.

    Args:
        scales: the largest input and output gradient. Where they, or their products, have squares
            that vanish, a part of zeros is no F of zero.
    """
    inputs, grads = scales
    products = inputs * inputs, grads * grads, inputs * grads, (inputs * grads) ** 2
    vanish = all(scales) and min(products) < torch.finfo(block.dtype).tiny
    with naming(name):
        for largest in _largest(block):
            if not math.isfinite(largest):
                raise ValueError(beyond("its block", block.dtype, ""))
            check_representable(largest or (min(products) if vanish else 0.0), block.dtype)
