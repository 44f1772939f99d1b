"""What is drawn of a block: its factors as images, its eigenvalues as a curve."""

from __future__ import annotations

import base64
import struct
import zlib
from typing import NamedTuple

import torch
from torch import Tensor

from kfoc import (
    Block,
    DenseBlock,
    DiagonalBlock,
    EigenBlock,
    GroupedBlock,
    KroneckerBlock,
)

# Larger matrices are shown by the means of blocks of entries.
PIXELS = 64
# Points of a spectrum; those of larger factors and blocks take too long to compute.
POINTS = 120
FACTOR_LIMIT = 4096
BLOCK_LIMIT = 2**24

# Of positive and of negative entries; how far from zero is in the opacity, so that the same image
# does on a light page and on a dark one.
POSITIVE, NEGATIVE = (47, 111, 196), (208, 90, 46)
LEVELS = 127


class Heatmap(NamedTuple):
    """An image of a matrix: its name, its shape, and a PNG as data URI."""

    name: str
    shape: tuple[int, int]
    uri: str


class Spectrum(NamedTuple):
    """Eigenvalues by rank (from 1), falling: some of them where there are many; and how many."""

    rank: tuple[float, ...]
    value: tuple[float, ...]
    total: int


def heatmaps(block: Block) -> tuple[Heatmap, ...]:
    """The factors of a block, or its diagonal laid out as the weight."""
    if isinstance(block, GroupedBlock):
        first = heatmaps(block.blocks[0])
        return tuple(h._replace(name=f"{h.name} (group 1 of {len(block.blocks)})") for h in first)
    if isinstance(block, KroneckerBlock):
        # Of an embedding, `right` is a diagonal: one row.
        named = [("left, output gradients", block.left), ("right, inputs", block.right)]
    elif isinstance(block, EigenBlock):
        named = [("eigenvalues in the eigenbasis", block.eigenvalues)]
    elif isinstance(block, DiagonalBlock):
        named = [("laid out as the weight", block.diagonal)]
    elif isinstance(block, DenseBlock):
        named = [("exact block", block.matrix)]
    else:
        return ()
    return tuple(heatmap(name, matrix) for name, matrix in named)


def heatmap(name: str, matrix: Tensor) -> Heatmap:
    """The signed root of the entries over the largest, at most 64 x 64."""
    rows = matrix.detach().double().cpu().reshape(-1, matrix.shape[-1])
    small = reduced(rows)
    largest = small.abs().max().item()
    share = small / largest if largest else small
    signed = share.sign() * share.abs().sqrt()
    levels = (signed * LEVELS).round().to(torch.int64) + LEVELS
    uri = "data:image/png;base64," + base64.b64encode(png(levels)).decode()
    return Heatmap(name, (rows.shape[0], rows.shape[1]), uri)


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


def png(levels: Tensor) -> bytes:
    """A palette PNG of integers from 0 (most negative) to 254 (most positive); 127 is clear."""
    height, width = levels.shape
    palette, opacity = bytearray(), bytearray()
    for level in range(2 * LEVELS + 1):
        palette += bytes(POSITIVE if level > LEVELS else NEGATIVE)
        opacity.append(round(255 * abs(level - LEVELS) / LEVELS))
    rows = b"".join(b"\0" + bytes(row) for row in levels.tolist())
    header = struct.pack(">IIBBBBB", width, height, 8, 3, 0, 0, 0)
    chunks = (
        (b"IHDR", header),
        (b"PLTE", bytes(palette)),
        (b"tRNS", bytes(opacity)),
        (b"IDAT", zlib.compress(rows, 9)),
        (b"IEND", b""),
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(kind, body) for kind, body in chunks)


def _chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def spectrum(block: Block) -> Spectrum | None:
    """The positive eigenvalues of a block; None where they take too long to compute."""
    values = eigenvalues(block)
    if values is None:
        return None
    falling = values.flatten().sort(descending=True).values
    # What is left of a zero after rounding is not an eigenvalue.
    floor = falling[0].item() * torch.finfo(block.dtype).eps if len(falling) else 0.0
    positive = falling[falling > floor]
    if not len(positive):
        return None
    last = torch.tensor(float(len(positive)), dtype=torch.float64).log10().item()
    ranks = torch.logspace(0, last, POINTS, dtype=torch.float64).round().long()
    ranks = ranks.clamp(1, len(positive)).unique()
    return Spectrum(
        tuple(map(float, ranks.tolist())), tuple(positive[ranks - 1].tolist()), len(positive)
    )


def eigenvalues(block: Block) -> Tensor | None:
    """All eigenvalues, in float64, in any order and shape."""
    if block.shape[0] * block.shape[1] > BLOCK_LIMIT:
        return None
    if isinstance(block, GroupedBlock):
        parts = [eigenvalues(part) for part in block.blocks]
        found = [part.flatten() for part in parts if part is not None]
        return torch.cat(found) if len(found) == len(parts) else None
    if isinstance(block, KroneckerBlock):
        sides = [_of_factor(factor) for factor in (block.left, block.right)]
        if sides[0] is None or sides[1] is None:
            return None
        return torch.outer(sides[0], sides[1])
    if isinstance(block, EigenBlock):
        return block.eigenvalues.double().cpu()
    if isinstance(block, DiagonalBlock):
        return block.diagonal.double().cpu()
    return _of_factor(block.matrix) if isinstance(block, DenseBlock) else None


def _of_factor(factor: Tensor) -> Tensor | None:
    if factor.ndim == 1:
        return factor.double().cpu()
    return torch.linalg.eigvalsh(factor.double().cpu()) if len(factor) <= FACTOR_LIMIT else None
