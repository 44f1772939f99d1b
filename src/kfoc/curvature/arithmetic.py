"""Two curvatures of the same layers: their sum, and how far apart they are."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kfoc.blocks import (
    Block,
    DenseBlock,
    DiagonalBlock,
    EigenBlock,
    GroupedBlock,
    KroneckerBlock,
    LowRankBlock,
    Report,
)
from kfoc.nearest.pair import nearest_to_pair, recompressed


@dataclass(frozen=True)
class Comparison:
    """How a block B compares with a block A.

    Attributes:
        relative_distance: `||A - B||_F / ||A||_F`. It comes from inner products, so distances
            under about 1e-7 are rounding. Infinite where A alone is zero.
        cosine: `<A, B> / (||A||_F ||B||_F)`: their likeness up to scale. NaN where one is zero.
    """

    relative_distance: float
    cosine: float


def compared(first: Block, second: Block) -> Comparison:
    """The comparison of two blocks of any kinds.

    Raises:
        ValueError: blocks of different shapes, or that are not finite.
    """
    if first.shape != second.shape:
        raise ValueError(f"the blocks have the shapes {first.shape} and {second.shape}")
    a, b = (block.to("cpu", torch.float64) for block in (first, second))
    norms = a.frobenius_norm(), b.frobenius_norm()
    if not all(map(math.isfinite, norms)):
        raise ValueError(f"the blocks have norms that are not finite: {norms[0]} and {norms[1]}")
    if not min(norms):
        both = not max(norms)
        distance = 0.0 if both else 1.0 if norms[0] else math.inf
        return Comparison(distance, math.nan)
    # Normalised first, as the squares of small curvatures could underflow.
    cosine = a.scaled(1 / norms[0]).inner(b.scaled(1 / norms[1]))
    ratio = norms[1] / norms[0]
    squared = (1 - ratio) ** 2 + 2 * ratio * (1 - cosine)
    return Comparison(math.sqrt(max(squared, 0.0)), min(max(cosine, -1.0), 1.0))


def merged(first: Block, second: Block, shares: tuple[float, float]) -> Block:
    """`shares[0] * first + shares[1] * second`, or the closest block of their kind.

    Raises:
        ValueError: different kinds or shapes, or blocks in different eigenbases.
    """
    if type(first) is not type(second) or first.shape != second.shape:
        raise ValueError(
            f"a {_described(first)} and a {_described(second)} do not add up to either kind: fit "
            "both with the same estimator"
        )
    # In the wider dtype, where the first is.
    dtype = torch.promote_types(first.dtype, second.dtype)
    first, second = (block.to(first.device, dtype) for block in (first, second))
    report = _report(first.report, second.report)
    if isinstance(first, GroupedBlock) and isinstance(second, GroupedBlock):
        if first.sizes != second.sizes:
            raise ValueError(f"the groups differ: {first.sizes} and {second.sizes} outputs")
        pairs = zip(first.blocks, second.blocks, strict=True)
        return GroupedBlock(tuple(merged(a, b, shares) for a, b in pairs), report=report)
    if isinstance(first, KroneckerBlock) and isinstance(second, KroneckerBlock):
        left, right = nearest_to_pair(
            (first.left, first.right), (second.left, second.right), shares
        )
        return replace(first, left=left, right=right, report=report)
    if isinstance(first, LowRankBlock) and isinstance(second, LowRankBlock):
        return _of_low_rank(first, second, shares, report)
    if isinstance(first, EigenBlock) and isinstance(second, EigenBlock):
        return _of_eigen(first, second, shares, report)
    if isinstance(first, DiagonalBlock) and isinstance(second, DiagonalBlock):
        diagonal = _weighted(first.diagonal, second.diagonal, shares)
        return replace(first, diagonal=diagonal, report=report)
    if isinstance(first, DenseBlock) and isinstance(second, DenseBlock):
        matrix = _weighted(first.matrix, second.matrix, shares)
        return replace(first, matrix=matrix, report=report)
    raise ValueError(f"blocks of the kind {type(first).__name__} cannot be added")


def _of_low_rank(
    first: LowRankBlock, second: LowRankBlock, shares: tuple[float, float], report: Report
) -> LowRankBlock:
    lefts = torch.cat([first.lefts * shares[0], second.lefts * shares[1]])
    rights = torch.cat([first.rights, second.rights])
    rank = max(first.rank, second.rank)
    return LowRankBlock(*recompressed(lefts, rights, rank), report=report)


def _of_eigen(
    first: EigenBlock, second: EigenBlock, shares: tuple[float, float], report: Report
) -> EigenBlock:
    same = torch.equal(first.left_vectors, second.left_vectors) and torch.equal(
        first.right_vectors, second.right_vectors
    )
    if not same:
        raise ValueError(
            "the two blocks are diagonal in different eigenbases, and their sum in neither: fit "
            "EigenCorrected on the data of both, or add curvatures of its base estimator"
        )
    eigenvalues = _weighted(first.eigenvalues, second.eigenvalues, shares)
    return replace(first, eigenvalues=eigenvalues, report=report)


def _weighted(first: Tensor, second: Tensor, shares: tuple[float, float]) -> Tensor:
    return first * shares[0] + second * shares[1]


def _report(first: Report, second: Report) -> Report:
    return Report(
        steps=max(first.steps, second.steps),
        converged=first.converged and second.converged,
        plan=first.plan if first.plan == second.plan else "",
    )


def _described(block: Block) -> str:
    o, i = block.shape
    return f"{type(block).__name__} {o} x {i}"
