"""Kronecker-factored approximate curvature, the estimator everyone uses."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kfoc.blocks import Block, KroneckerBlock, KroneckerDiagonalBlock
from kfoc.errors import Footprint
from kfoc.estimators.base import State
from kfoc.estimators.factored import FactoredEstimator, factors_bytes
from kfoc.estimators.pooling import Pooling, Sum, summed, together
from kfoc.estimators.tokens import add_counts
from kfoc.linalg.products import add_symmetric, mirrored
from kfoc.nearest.pair import nearest_to_pair
from kfoc.plans.base import CHUNK
from kfoc.plans.single import single_rows
from kfoc.samples.base import chunks
from kfoc.samples.linear import Samples
from kfoc.samples.tied import Tied


@dataclass
class _State(State):
    """Means over the samples so far, on and above the diagonal, and the sum of their weights."""

    left: Tensor
    right: Tensor
    samples: float = 0

    @staticmethod
    def begin(samples: Samples) -> _State:
        o, like = samples.shape[0], samples.grads
        # Not zeros, which would be written twice: the first batch takes nothing of what is there.
        full = like.new_empty if len(samples.right_shape) == 2 else like.new_zeros
        return _State(like.new_empty(o, o), full(samples.right_shape))

    def add(self, samples: Samples, alone: bool) -> None:
        count = self.samples + samples.num_samples
        before, share = self.samples / count, 1 / count
        self.samples = count
        grads = samples.grads.reshape(-1, samples.shape[0])
        # Averaged per batch, as the number of positions may differ between batches.
        left_share = share / (samples.rows_per_sample or max(1, samples.num_positions))
        if self.left.ndim == 1:
            self.left.mul_(before).add_(grads.square().sum(0), alpha=left_share)
        else:
            add_symmetric(self.left, grads, grads, alpha=left_share, beta=before)
        if samples.diagonal:
            add_counts(self.right.mul_(before), samples, share)
            return
        if samples.num_positions == 1:
            _add_single(self.right, samples, share, before)
            return
        per_sample = samples.num_positions * samples.shape[1]
        for start, stop in chunks(samples, per_sample, CHUNK):
            rows = samples.inputs.columns(start, stop).flatten(1).mT
            beta = before if start == 0 else 1.0
            add_symmetric(self.right, rows, rows, alpha=share, beta=beta)

    def decay(self, factor: float) -> None:
        # The factors are means: what they weigh against the next batch is the count alone.
        self.samples *= factor

    def pooled(self) -> Pooling[None]:
        """The means over all ranks' samples."""
        factors = [self.left, self.right]
        for factor in factors:
            # Without samples, the factors are memory that nobody has written to.
            factor.mul_(self.samples) if self.samples else factor.zero_()
        yield [Sum(factors)]
        (self.samples,) = yield from summed(self.samples)
        for factor in factors:
            factor.div_(self.samples)

    def factors(self) -> tuple[Tensor, Tensor]:
        return mirrored(self.left), mirrored(self.right)

    def block(self, num_samples: float) -> Block:
        kind = KroneckerDiagonalBlock if self.right.ndim == 1 else KroneckerBlock
        return kind(*self.factors())


@dataclass
class _TiedState(State):
    """Of an embedding and a head that share their weight: of each by itself."""

    head: _State
    embedding: _State

    def add(self, samples: Tied, alone: bool) -> None:
        self.head.add(samples.head, alone)
        self.embedding.add(samples.embedding, alone)

    def decay(self, factor: float) -> None:
        self.head.decay(factor)
        self.embedding.decay(factor)

    def pooled(self) -> Pooling[None]:
        yield from together([self.head.pooled(), self.embedding.pooled()])

    def block(self, num_samples: float) -> Block:
        # The embedding's weight is the head's transposed: its factors change sides.
        left, right = nearest_to_pair(self.head.factors(), self.embedding.factors()[::-1])
        if left.ndim == 1:  # the block is then about the embedding's weight, transposed
            return KroneckerDiagonalBlock(right, left)
        return KroneckerBlock(left, right)


@dataclass(frozen=True)
class KFAC(FactoredEstimator):
    """K-FAC: inputs and output gradients taken as independent, and positions as uncorrelated.

    `right` is the second moment of the inputs summed over positions, `left` that of the output
    gradients averaged over positions (Martens & Grosse 2015; Grosse & Martens 2016, KFC, for
    convolutions and shared linear layers). One multiplication of the two gives the block.
    Where an embedding and a head share their weight, each has its product, their uses count as
    uncorrelated too, and the block is the Kronecker product closest to the sum.
    """

    def begin_one(self, layer: str, samples: Samples) -> State:
        return _State.begin(samples)

    def begin_tied(self, layer: str, samples: Tied) -> State:
        (size, width), new_zeros = samples.head.shape, samples.grads.new_zeros
        # Of a large vocabulary the diagonal alone, on both sides.
        left = new_zeros(size) if samples.diagonal else new_zeros(size, size)
        return _TiedState(_State(left, new_zeros(width, width)), _State.begin(samples.embedding))

    def footprint_one(self, samples: Samples) -> Footprint:
        size = factors_bytes(samples)
        return Footprint(size, size)

    def footprint_tied(self, samples: Tied) -> Footprint:
        # Those of the embedding are the block's, and the head has as many.
        size = factors_bytes(samples.embedding)
        return Footprint(2 * size, size)


def _add_single(total: Tensor, samples: Samples, share: float, before: float) -> None:
    """`total = before * total + share * sum a a^T`, without writing out the column of a bias."""
    values, constant = single_rows(samples.inputs)
    inner = total if constant is None else total[:-1, :-1]
    add_symmetric(inner, values, values, alpha=share, beta=before)
    if constant is not None:
        column, corner = total[:, -1], constant**2 * share * len(values)
        if not before:  # the memory is one that nobody has written to
            torch.mul(values.sum(0), constant * share, out=column[:-1])
            column[-1] = corner
            return
        column[:-1].mul_(before).add_(values.sum(0), alpha=constant * share)
        column[-1].mul_(before).add_(corner)
