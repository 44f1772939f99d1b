"""What is computed from the pairs (sample, token) of an embedding, without any (V, V) matrix.

With large vocabularies the right factor is restricted to a diagonal: `F ~ left (x) diag(right)`,
`right` of shape (V,). The closest product of that structure is, as in Lemma 3.2 of the paper, the
leading singular triple of the rearranged F, of whose V^2 columns only the V of the diagonal are
kept. Where every sample holds one token the others are zero, and the restriction costs nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from kfoc.linalg.products import add_symmetric, halves, mirrored, times_half
from kfoc.nearest.contraction import Contraction, Side
from kfoc.plans.base import CHUNK
from kfoc.samples.base import chunks, gradient_chunks
from kfoc.samples.linear import Samples
from kfoc.samples.one_hot import merged_pairs
from kfoc.samples.tied import Tied


class _Explicit(Contraction):
    """Iterates on the factors themselves: `left` a matrix, `right` the vector of a diagonal."""

    def advance(self, representation: Tensor, side: Side) -> Tensor:
        return self.apply(representation, side)

    def factor(self, representation: Tensor, side: Side) -> Tensor:
        # Rounding must not leave the diagonal negative, of a factor that is PSD.
        diagonal = side == "right" and self.positive(representation, side)
        return representation.clamp(min=0) if diagonal else representation

    def positive(self, representation: Tensor, side: Side) -> bool:
        """Whether the factor is positive semi-definite to rounding."""
        if side == "right":
            return representation.min().item() >= -1e-6 * representation.max().item()
        values = torch.linalg.eigvalsh(representation)
        return values[0].item() >= -1e-6 * values[-1].item()

    def inner(self, first: Tensor, second: Tensor, side: Side) -> Tensor:
        return (first * second).sum()


class TokenPairs(_Explicit):
    """The half steps go through the pairs: P d^2 multiply-adds each.

    `right[token] = sum_{p of that token} v_p^T left v_p` and
    `left = sum_p right[token_p] v_p v_p^T`.
    """

    plan = "tokens"

    def __init__(self, samples: Samples) -> None:
        pairs = merged_pairs(samples)
        self._pairs = pairs
        self._size = samples.inputs.size
        self._samples = samples.num_samples
        self._rows = pairs.vectors.flatten(0, 1)  # (S P, d)
        self._tokens = pairs.tokens.repeat(len(pairs.vectors))

    def start(self) -> Tensor:
        ones = self._rows.new_ones(self._size)
        return self.apply(ones / math.sqrt(self._size), "right")

    def apply(self, matrix: Tensor, side: Side) -> Tensor:
        if side == "left":
            return self._to_right(matrix)
        width = self._rows.shape[1]
        left = self._rows.new_zeros(width, width)
        for rows, tokens in self._parts():
            add_symmetric(left, rows, rows * matrix[tokens, None])
        return mirrored(left)

    def _to_right(self, left: Tensor) -> Tensor:
        right, diagonal = self._rows.new_zeros(self._size), halves(left)
        for rows, tokens in self._parts():
            values = torch.linalg.vecdot(times_half(rows, left, diagonal), rows)
            right.index_add_(0, tokens, values, alpha=2)
        return right

    def _parts(self) -> Iterator[tuple[Tensor, Tensor]]:
        step = max(256, CHUNK // self._rows.shape[1])
        return zip(self._rows.split(step), self._tokens.split(step), strict=True)

    @property
    def certifies(self) -> bool:
        # All inner products between pairs then cost no more than a few half steps.
        return len(self._rows) <= 4 * self._rows.shape[1]

    def squared_norm(self) -> float:
        """`||F||^2 = sum_{k,l} <X_k, X_l>^2`, of F itself and not of its restriction.

        sigma is the inner product of F with a product of unit norm in the structure, so
        `||F - block||^2 = ||F||^2 - sigma^2` holds with the whole norm.
        """
        directions = len(self._pairs.vectors)
        offsets = torch.arange(directions, device=self._tokens.device) * self._samples
        owners = (self._pairs.owners + offsets[:, None]).flatten()
        products = (self._rows @ self._rows.mT) * (self._tokens[:, None] == self._tokens)
        count = directions * self._samples
        by_sample = products.new_zeros(count, len(products)).index_add_(0, owners, products)
        inner = products.new_zeros(count, count).index_add_(1, owners, by_sample)
        return inner.square_().sum(dtype=torch.float64).item()


class TiedTokens(_Explicit):
    """The half steps of an embedding that shares its weight with the head.

    All V rows of a per-sample gradient are non-zero: with its outer products `q_t p_t^T`,
    `right = sum_t (P left P^T Q)_t * Q_t` and `left = sum P^T Q diag(right) Q^T P`, by chunks.
    For T positions that takes min(T, d)^2 V multiply-adds a sample, where the head takes T d V.
    """

    plan = "tied tokens"

    def __init__(self, samples: Tied) -> None:
        self._samples = samples

    def start(self) -> Tensor:
        size = self._samples.shape[1]
        return self.apply(self._samples.grads.new_ones(size) / math.sqrt(size), "right")

    def apply(self, matrix: Tensor, side: Side) -> Tensor:
        width, size = self._samples.shape
        shape = (size,) if side == "left" else (width, width)
        image = self._samples.grads.new_zeros(shape)
        if side == "left":
            matrix = mirrored(matrix.clone())
        for outer, inner in self._parts():  # (n, T, d) and (S, n, T, V)
            if side == "left":
                by_positions = outer @ matrix @ outer.mT
                for grads in inner:
                    image += torch.bmm(by_positions, grads).mul_(grads).sum((0, 1))
                continue
            for grads in inner:
                weighted = torch.bmm(grads * matrix, grads.mT)
                image += torch.bmm(outer.mT, torch.bmm(weighted, outer)).sum(0)
        return image if side == "left" else (image + image.mT) / 2

    def _parts(self) -> Iterator[tuple[Tensor, Tensor]]:
        samples = self._samples
        width, size = samples.shape
        positions = max(1, min(samples.num_positions, width) * samples.num_directions)
        for start, stop in chunks(samples, positions * size, CHUNK):
            flat = samples.part(start, stop).as_positions()
            yield flat.inputs.rows(0, stop - start), flat.grads

    def squared_norm(self) -> float:
        """`sum_{k,l} <X_k, X_l>^2`, of F itself and not of its restriction."""
        total = 0.0
        for first in gradient_chunks(self._samples, CHUNK):
            for second in gradient_chunks(self._samples, CHUNK):
                products = first.flatten(0, 1).flatten(1) @ second.flatten(0, 1).flatten(1).mT
                total += products.square_().sum(dtype=torch.float64).item()
        return total
