"""What is drawn of a block: its factors as images, its eigenvalues as a curve."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from kfoc import Block, DenseBlock, DiagonalBlock, EigenBlock, GroupedBlock, KroneckerBlock
from kfoc.compare.convergence import Curve

# Larger matrices are shown by the means of blocks of entries.
PIXELS = 64
# Points of a spectrum; those of larger factors and blocks take too long to compute.
POINTS = 120
FACTOR_LIMIT = 4096
BLOCK_LIMIT = 2**24
# What is shown of a block, by the names of its parts. Of an embedding, `right` is one row.
SHOWN: dict[type[Block], dict[str, str]] = {
    KroneckerBlock: {"left": "left, output gradients", "right": "right, inputs"},
    EigenBlock: {"eigenvalues": "eigenvalues in the eigenbasis"},
    DiagonalBlock: {"diagonal": "laid out as the weight"},
    DenseBlock: {"matrix": "exact block"},
}


class Heatmap(NamedTuple):
    """A matrix to look at: its name, its shape, and its pixels from -1 to 1."""

    name: str
    shape: tuple[int, int]
    pixels: Tensor


def heatmaps(block: Block) -> tuple[Heatmap, ...]:
    """The factors of a block, or its diagonal laid out as the weight."""
    if isinstance(block, GroupedBlock):
        first = heatmaps(block.blocks[0])
        return tuple(h._replace(name=f"{h.name} (group 1 of {len(block.blocks)})") for h in first)
    named = SHOWN.get(type(block), {})
    return tuple(heatmap(name, getattr(block, part)) for part, name in named.items())


def heatmap(name: str, matrix: Tensor) -> Heatmap:
    """The signed root of the entries over the largest, at most 64 x 64."""
    rows = matrix.detach().double().cpu().reshape(-1, matrix.shape[-1])
    small = reduced(rows)
    share = small / (small.abs().max().item() or 1.0)
    return Heatmap(name, (rows.shape[0], rows.shape[1]), share.sign() * share.abs().sqrt())


def reduced(matrix: Tensor) -> Tensor:
    """Means over blocks of entries, where a side is longer than `PIXELS`."""
    for _ in range(2):
        size = matrix.shape[0]
        if size > PIXELS:
            bins = torch.arange(size) * PIXELS // size
            sums = matrix.new_zeros(PIXELS, matrix.shape[1]).index_add_(0, bins, matrix)
            matrix = sums / bins.bincount(minlength=PIXELS)[:, None]
        matrix = matrix.T
    return matrix


def spectrum(block: Block) -> Curve | None:
    """The positive eigenvalues of a block by rank from 1, falling: some where there are many.

    None where they take too long to compute.
    """
    values = eigenvalues(block)
    if values is None or not values.numel():
        return None
    falling = values.flatten().sort(descending=True).values
    # What is left of a zero after rounding is not an eigenvalue.
    positive = falling[falling > falling[0] * torch.finfo(block.dtype).eps]
    if not len(positive):
        return None
    count = torch.tensor(len(positive), dtype=torch.float64)
    ranks = torch.logspace(0, count.log10().item(), POINTS, dtype=torch.float64).round().long()
    ranks = ranks.clamp(1, len(positive)).unique()
    return Curve(tuple(map(float, ranks.tolist())), tuple(positive[ranks - 1].tolist()))


def eigenvalues(block: Block) -> Tensor | None:
    """All eigenvalues, in float64, in any order and shape."""
    if block.shape[0] * block.shape[1] > BLOCK_LIMIT:
        return None
    if isinstance(block, GroupedBlock):
        parts = [eigenvalues(part) for part in block.blocks]
        found = [part.flatten() for part in parts if part is not None]
        return torch.cat(found) if len(found) == len(parts) else None
    if isinstance(block, KroneckerBlock):
        left, right = _of_factor(block.left), _of_factor(block.right)
        return None if left is None or right is None else torch.outer(left, right)
    if isinstance(block, DenseBlock):
        return _of_factor(block.matrix)
    values = getattr(block, "eigenvalues", getattr(block, "diagonal", None))
    return None if values is None else values.double().cpu()


def _of_factor(factor: Tensor) -> Tensor | None:
    if factor.ndim == 1:
        return factor.double().cpu()
    return torch.linalg.eigvalsh(factor.double().cpu()) if len(factor) <= FACTOR_LIMIT else None
