"""Matrix products that do half the work where one side is symmetric.

torch has no product that knows of symmetry, so both are done by block columns: only the blocks on
and above the diagonal are computed. With b blocks that is (b + 1) / 2b of the multiply-adds.
"""

from __future__ import annotations

import math
from functools import cache
from itertools import pairwise

import torch
from torch import Tensor

# Narrower blocks would cost more in the rate of the products than they save in multiply-adds.
MIN_BLOCK = 128
MAX_BLOCKS = 8
# Rows of a transposed copy: few enough to stay in the cache.
TILE = 128


@cache
def blocks(size: int) -> list[tuple[int, int]]:
    """The column ranges that a symmetric (size, size) product is split into."""
    # A power of two of blocks, at even offsets: others ran up to a fifth slower.
    count = min(MAX_BLOCKS, 2 ** max(0, (size // MIN_BLOCK).bit_length() - 1))
    inner = [16 * round(k * size / count / 16) for k in range(1, count)]
    return list(pairwise([0, *inner, size]))


def share(size: int) -> float:
    """The share of a full product's multiply-adds that the split leaves."""
    return sum((stop - start) * stop for start, stop in blocks(size)) / max(size, 1) ** 2


def add_symmetric(
    total: Tensor, first: Tensor, second: Tensor, alpha: float = 1.0, beta: float = 1.0
) -> None:
    """`total = beta * total + alpha * first^T second`, on and above the block diagonal alone.

    Args:
        total: (n, n); call `mirrored` once all is added. Its values do not matter for `beta=0`.
        first, second: (k, n), such that `first^T second` is symmetric.
    """
    for start, stop in blocks(total.shape[0]):
        part = total[:stop, start:stop]
        part.addmm_(first[:, :stop].mT, second[:, start:stop], alpha=alpha, beta=beta)


def mirrored(total: Tensor) -> Tensor:
    """Complete, in place, the symmetric matrix of which `add_symmetric` holds the upper part.

    A vector stands for a diagonal matrix, and is complete.
    """
    if total.ndim == 1:
        return total
    size = total.shape[0]
    for start in range(0, size, TILE):
        stop = min(start + TILE, size)
        block = total[start:stop, start:stop]
        block.copy_(torch.where(_below(stop - start, block.device), block.mT, block))
        if stop == size:
            break
        rest = total[start:stop, stop:]
        # Rows that lie a power of two apart would evict one another from the cache.
        rest = rest.contiguous() if size % 512 == 0 else rest
        total[stop:, start:stop].copy_(rest.mT)
    return total


@cache
def _below(size: int, device: torch.device) -> Tensor:
    """Whether an entry is below the diagonal."""
    return torch.ones(size, size, dtype=torch.bool, device=device).tril(-1)


def gram(rows: Tensor) -> Tensor:
    """`rows^T rows`, exactly symmetric, (n, n) from (k, n)."""
    total = rows.new_empty(rows.shape[1], rows.shape[1])
    add_symmetric(total, rows, rows, beta=0.0)
    return mirrored(total)


def halves(symmetric: Tensor) -> list[Tensor]:
    """The blocks on the diagonal of the upper triangular U with `U + U^T` the symmetric matrix.

    The rest of U is what `symmetric` has above these blocks, so U itself need not be formed. It
    serves `rows @ symmetric @ rows^T`, which is `M + M^T` for `M = rows @ U @ rows^T`.
    """
    found = []
    for start, stop in blocks(symmetric.shape[0]):
        upper = symmetric[start:stop, start:stop].triu()
        upper.diagonal().mul_(0.5)
        found.append(upper)
    return found


def times_half(
    rows: Tensor, symmetric: Tensor, diagonal: list[Tensor], out: Tensor | None = None
) -> Tensor:
    """`rows @ U`, (k, n), for the U of a symmetric matrix and its `halves`.

    The matrix is read on and above the diagonal alone.
    """
    product = rows.new_empty(rows.shape) if out is None else out
    for (start, stop), upper in zip(blocks(symmetric.shape[0]), diagonal, strict=True):
        part = product[:, start:stop]
        torch.mm(rows[:, start:stop], upper, out=part)
        if start:
            part.addmm_(rows[:, :start], symmetric[:start, start:stop])
    return product


def orthonormal(rows: Tensor) -> Tensor:
    """Orthonormal rows that span what is large in `rows`, (..., k, n).

    By the Cholesky factor of their inner products: where rows depend on one another, to half the
    precision, what is left of them is shorter than 1.
    """
    products = rows @ rows.mT
    diagonal = products.diagonal(dim1=-2, dim2=-1)
    info = torch.finfo(rows.dtype)
    diagonal += diagonal.sum(-1, keepdim=True) * math.sqrt(info.eps) / 256 + info.tiny
    factor = torch.linalg.cholesky_ex(products).L
    # The inverse first: rows are long, and products with them much faster than solves.
    unit = torch.eye(rows.shape[-2], dtype=rows.dtype, device=rows.device).expand_as(factor)
    return torch.linalg.solve_triangular(factor, unit, upper=False) @ rows
