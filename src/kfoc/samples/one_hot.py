"""Inputs that are tokens: rows with a single one, kept as indices.

An embedding `y = weight[token]`, with `weight` (V, d), is the linear map `W = weight^T` (d, V) of
one-hot rows, so its per-sample gradient is `X[s, n] = sum_t g[s,n,t] onehot(token[n,t])^T`: as many
non-zero columns as the sample has different tokens. Those columns are the sample's *pairs*.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kfoc.samples.linear import Samples

# Vocabularies up to this size get a full right factor, (V, V); larger ones its diagonal, (V,).
FULL_VOCABULARY = 1024


@dataclass(frozen=True)
class OneHot:
    """Inputs held as `tokens` (N, T), integers in [0, size); -1 where the row is zero (padding).

    Attributes:
        size: of the vocabulary.
        dtype: of the rows, when they are formed.
        scale: the value of the ones.
    """

    tokens: Tensor
    size: int
    dtype: torch.dtype
    scale: float = 1.0

    @property
    def num_samples(self) -> int:
        return self.tokens.shape[0]

    @property
    def num_positions(self) -> int:
        return self.tokens.shape[1]

    @property
    def diagonal(self) -> bool:
        return self.size > FULL_VOCABULARY

    def columns(self, start: int, stop: int) -> Tensor:
        return self.rows(start, stop).permute(2, 0, 1)

    def rows(self, start: int, stop: int) -> Tensor:
        tokens = self.tokens[start:stop].long()[..., None]
        rows = torch.zeros(
            *tokens.shape[:2], self.size, dtype=self.dtype, device=self.tokens.device
        )
        ones = (tokens >= 0).to(self.dtype) * self.scale
        return rows.scatter_(2, tokens.clamp(min=0), ones)

    def magnitude(self) -> float:
        return abs(self.scale)

    def scaled(self, factor: float) -> OneHot:
        return replace(self, scale=self.scale * factor)

    @property
    def tensor(self) -> Tensor:
        return self.tokens

    def with_tensor(self, tensor: Tensor) -> OneHot:
        return replace(self, tokens=tensor)

    def silent(self, count: int) -> OneHot:
        return replace(self, tokens=self.tokens.new_zeros(count, 0))


@dataclass(frozen=True)
class Pairs:
    """The non-zero columns of per-sample gradients: one pair for each sample and token in it.

    Attributes:
        vectors: (S, P, d), column `tokens[p]` of `X[s, owners[p]]`.
        tokens: (P,).
        owners: (P,), the sample of each pair, in ascending order.
    """

    vectors: Tensor
    tokens: Tensor
    owners: Tensor


def merged_pairs(samples: Samples) -> Pairs:
    """The pairs of samples whose inputs are `OneHot`: sums over the positions of equal tokens."""
    inputs = samples.inputs
    if not isinstance(inputs, OneHot):
        raise TypeError(f"the inputs must be tokens (OneHot), found {type(inputs).__name__}")
    flat = inputs.tokens.long().flatten()
    owners = torch.arange(samples.num_samples, device=flat.device)
    owners = owners.repeat_interleave(inputs.num_positions)
    present = flat >= 0
    keys = (owners * inputs.size + flat)[present]
    unique, places = keys.unique(return_inverse=True)
    grads = samples.grads.flatten(1, 2)[:, present]
    vectors = grads.new_zeros(len(grads), len(unique), grads.shape[2])
    vectors.index_add_(1, places, grads, alpha=inputs.scale)
    return Pairs(vectors, unique % inputs.size, unique // inputs.size)
