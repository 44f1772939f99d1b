"""Whether blocks are within the range of their dtype."""

from __future__ import annotations

import math

import torch

from kfoc.blocks import Block, GroupedBlock, KroneckerBlock
from kfoc.errors import naming
from kfoc.linalg.scaling import beyond, check_representable, largest, magnitude


def _sizes(block: Block) -> list[float]:
    """The largest numbers of a block's parts, of which it is the product; not finite where one is
    not. Those of a semi-definite factor are bounded by its diagonal, and to look at all of them
    would take as long as a small fit."""
    if isinstance(block, GroupedBlock):
        return [*map(largest, zip(*map(_sizes, block.blocks), strict=True))]
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
        for size in _sizes(block):
            if not math.isfinite(size):
                raise ValueError(beyond("its block", block.dtype, ""))
            check_representable(size or (min(products) if vanish else 0.0), block.dtype)
