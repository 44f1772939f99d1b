"""Sums over the samples of a layer whose inputs are tokens."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from kfoc.plans.base import CHUNK
from kfoc.samples.base import chunks
from kfoc.samples.linear import Samples
from kfoc.samples.one_hot import Pairs, merged_pairs


def add_squares(total: Tensor, samples: Samples) -> None:
    """`total += sum_{s,n} X^2`, elementwise, (d, V), of samples whose inputs are tokens."""
    for _, pairs in _pairs_by_chunks(samples, samples.shape[0]):
        total.index_add_(1, pairs.tokens, pairs.vectors.square().sum(0).mT)


def add_counts(total: Tensor, samples: Samples, alpha: float) -> None:
    """`total += alpha * sum_{n,t} a^2`, (V,): how often every token occurs."""
    tokens = samples.inputs.tensor.flatten().long()
    ones = total.new_full(tokens.shape, alpha * samples.inputs.magnitude() ** 2)
    total.index_add_(0, tokens.clamp(min=0), ones * (tokens >= 0))


def add_products(
    products: Tensor, vectors: Tensor, samples: Samples, scale: float, weights: Tensor | None = None
) -> None:
    """`products += scale * sum_{s,n} w X <X, v>` for every v, both (m, d, V).

    Args:
        weights: w, (m, n); None: all 1.
    """
    start = 0
    for count, pairs in _pairs_by_chunks(samples, len(vectors) * samples.shape[0]):
        gathered = vectors[:, :, pairs.tokens]  # (m, d, P)
        by_pair = torch.einsum("mdp,spd->msp", gathered, pairs.vectors)
        inner = by_pair.new_zeros(*by_pair.shape[:2], count)
        inner.index_add_(2, pairs.owners, by_pair)
        if weights is not None:
            inner *= weights[:, None, start : start + count]
        start += count
        step = torch.einsum("msp,spd->mdp", inner[:, :, pairs.owners], pairs.vectors)
        products.index_add_(2, pairs.tokens, step, alpha=scale)


def _pairs_by_chunks(samples: Samples, per_position: int) -> Iterator[tuple[int, Pairs]]:
    """The pairs of ranges of samples, with their number of samples."""
    per_sample = max(samples.num_directions * samples.shape[0], per_position)
    for start, stop in chunks(samples, per_sample * max(1, samples.num_positions), CHUNK):
        yield stop - start, merged_pairs(samples.part(start, stop))
