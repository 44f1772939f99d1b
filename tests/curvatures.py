"""A curvature of every kind of block, from random factors, and dense references for it."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

import kfoc
from kfoc.blocks import KINDS
from kfoc.parameters.layout import Layout


def psd(size: int, rank: int | None = None) -> Tensor:
    rows = torch.randn(rank or size + 2, size)
    return rows.mT @ rows / len(rows)


def orthogonal(size: int) -> Tensor:
    return torch.linalg.qr(torch.randn(size, size))[0]


def low_rank(o: int, i: int) -> kfoc.LowRankBlock:
    """The closest sum of three products to a singular F, which makes it indefinite."""
    fisher = psd(o * i, 6).view(o, i, o, i)
    matrix = fisher.permute(0, 2, 1, 3).reshape(o * o, i * i)
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    roots = s[:3].sqrt()
    lefts = (u[:, :3] * roots).mT.reshape(3, o, o)
    rights = (v[:3] * roots[:, None]).reshape(3, i, i)
    sign = lefts[0].trace().sign()
    return kfoc.LowRankBlock(lefts * sign, rights * sign)


def block(kind: str, o: int = 4, i: int = 3) -> kfoc.Block:
    """One of a kind, (o, i), with an even o."""
    report = kfoc.Report(0.25, 0.01, 3, False, "gram")
    builders = {
        "KroneckerBlock": lambda: kfoc.KroneckerBlock(psd(o), psd(i), report=report),
        "KroneckerDiagonalBlock": lambda: kfoc.KroneckerDiagonalBlock(psd(o), torch.rand(i)),
        "GroupedBlock": lambda: kfoc.GroupedBlock(
            tuple(kfoc.KroneckerBlock(psd(o // 2), psd(i)) for _ in range(2)), report=report
        ),
        "DiagonalBlock": lambda: kfoc.DiagonalBlock(torch.rand(o, i), report=report),
        "DenseBlock": lambda: kfoc.DenseBlock(psd(o * i), (o, i)),
        "EigenBlock": lambda: kfoc.EigenBlock(orthogonal(o), orthogonal(i), torch.rand(o, i)),
        "LowRankBlock": lambda: low_rank(o, i),
    }
    assert builders.keys() == KINDS.keys(), "a new kind needs a builder here"
    return builders[kind]()


def curvature(*blocks: kfoc.Block, num_samples: int = 10) -> kfoc.Curvature:
    """Of layers "0", "1", ..., each with a weight and a bias."""
    layouts = {}
    for k, each in enumerate(blocks):
        o, i = each.shape
        layouts[str(k)] = Layout((f"{k}.weight", f"{k}.bias"), ((o, i - 1), (o,)))
    by_name = {str(k): each for k, each in enumerate(blocks)}
    return kfoc.Curvature(by_name, num_samples, layouts, {"9": "a reason"}, "KFOC()", "mc", 7)


def dense(found: kfoc.Curvature) -> Tensor:
    """F of all layers, (P, P)."""
    return torch.block_diag(*[each.to_dense() for each in found.values()])


def vector(found: kfoc.Curvature, *lead: int) -> dict[str, Tensor]:
    return {
        name: torch.randn(*lead, *shape)
        for layout in found.layouts.values()
        for name, shape in zip(layout.names, layout.shapes, strict=True)
    }


def flat(found: kfoc.Curvature, vectors: Mapping[str, Tensor]) -> Tensor:
    """(..., P), in the order of `dense`."""
    parts = []
    for layer in found:
        weight, bias = vectors[f"{layer}.weight"], vectors[f"{layer}.bias"]
        parts.append(torch.cat([weight, bias[..., None]], -1).flatten(-2))
    return torch.cat(parts, -1)


def power(matrix: Tensor, exponent: float) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values**exponent) @ vectors.mT
