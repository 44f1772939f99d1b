"""Kronecker-factored approximate curvature, the estimator everyone uses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from kfoc.blocks import KroneckerBlock, KroneckerDiagonalBlock
from kfoc.estimators.factored import FactoredEstimator, factors_bytes
from kfoc.memory import Footprint
from kfoc.pair import nearest_to_pair
from kfoc.plans import CHUNK, single_rows
from kfoc.pooling import Pooling, Sum, summed, together
from kfoc.products import add_symmetric, mirrored
from kfoc.samples import Samples, chunks
from kfoc.tied import Tied
from kfoc.token_plan import add_counts


class _State(NamedTuple):
    left: Tensor  # means over the samples so far, on and above the diagonal
    right: Tensor
    samples: float  # the sum of their weights


class _TiedState(NamedTuple):
    """Of an embedding and a head that share their weight: of each by itself."""

    head: _State
    embedding: _State


@dataclass(frozen=True)
class KFAC(FactoredEstimator):
    """K-FAC: inputs and output gradients taken as independent, and positions as uncorrelated.

    `right` is the second moment of the inputs summed over positions, `left` that of the output
    gradients averaged over positions (Martens & Grosse 2015; Grosse & Martens 2016, KFC, for
    convolutions and shared linear layers). One multiplication of the two gives the block.
    Where an embedding and a head share their weight, each has its product, their uses count as
    uncorrelated too, and the block is the Kronecker product closest to the sum.
    """

    def init_one(self, layer: str, samples: Samples) -> _State:
        o, like = samples.shape[0], samples.grads
        # Not zeros, which would be written twice: the first batch takes nothing of what is there.
        full = like.new_empty if len(samples.right_shape) == 2 else like.new_zeros
        return _State(like.new_empty(o, o), full(samples.right_shape), 0)

    def update_one(self, state: _State, samples: Samples, *, alone: bool) -> _State:
        count = state.samples + samples.num_samples
        before, share = state.samples / count, 1 / count
        grads = samples.grads.reshape(-1, samples.shape[0])
        # Averaged per batch, as the number of positions may differ between batches.
        left_share = share / (samples.rows_per_sample or max(1, samples.num_positions))
        if state.left.ndim == 1:
            state.left.mul_(before).add_(grads.square().sum(0), alpha=left_share)
        else:
            add_symmetric(state.left, grads, grads, alpha=left_share, beta=before)
        if samples.diagonal:
            add_counts(state.right.mul_(before), samples, share)
            return _State(state.left, state.right, count)
        if samples.num_positions == 1:
            _add_single(state.right, samples, share, before)
            return _State(state.left, state.right, count)
        per_sample = samples.num_positions * samples.shape[1]
        for start, stop in chunks(samples, per_sample, CHUNK):
            rows = samples.inputs.columns(start, stop).flatten(1).mT
            beta = before if start == 0 else 1.0
            add_symmetric(state.right, rows, rows, alpha=share, beta=beta)
        return _State(state.left, state.right, count)

    def init_tied(self, layer: str, samples: Tied) -> _TiedState:
        embedding = self.init_one(layer, samples.embedding)
        (size, width), new_zeros = samples.head.shape, samples.grads.new_zeros
        # Of a large vocabulary the diagonal alone, on both sides.
        left = new_zeros(size) if samples.diagonal else new_zeros(size, size)
        return _TiedState(_State(left, new_zeros(width, width), 0), embedding)

    def update_tied(self, state: _TiedState, samples: Tied, *, alone: bool) -> _TiedState:
        return _TiedState(
            self.update_one(state.head, samples.head, alone=alone),
            self.update_one(state.embedding, samples.embedding, alone=alone),
        )

    def pooled_one(self, state: _State | _TiedState) -> Pooling[_State | _TiedState]:
        parts = [state] if isinstance(state, _State) else list(state)
        parts = yield from together([_pooled(part) for part in parts])
        return parts[0] if isinstance(state, _State) else _TiedState(*parts)

    def footprint_one(self, samples: Samples) -> Footprint:
        size = factors_bytes(samples)
        return Footprint(size, size)

    def footprint_tied(self, samples: Tied) -> Footprint:
        # Those of the embedding are the block's, and the head has as many.
        size = factors_bytes(samples.embedding)
        return Footprint(2 * size, size)

    def decayed_one(self, state: _State | _TiedState, factor: float) -> _State | _TiedState:
        # The factors are means: what they weigh against the next batch is the count alone.
        if isinstance(state, _TiedState):
            return _TiedState(*(one._replace(samples=one.samples * factor) for one in state))
        return state._replace(samples=state.samples * factor)

    def finish_one(
        self, state: _State | _TiedState, num_samples: float
    ) -> KroneckerBlock | KroneckerDiagonalBlock:
        if isinstance(state, _TiedState):
            head, embedding = state
            of_head = mirrored(head.left), mirrored(head.right)
            # The embedding's weight is the head's transposed: its factors change sides.
            of_embedding = mirrored(embedding.right), mirrored(embedding.left)
            left, right = nearest_to_pair(of_head, of_embedding)
            if left.ndim == 1:  # the block is then about the embedding's weight, transposed
                return KroneckerDiagonalBlock(right, left)
            return KroneckerBlock(left, right)
        kind = KroneckerDiagonalBlock if state.right.ndim == 1 else KroneckerBlock
        return kind(mirrored(state.left), mirrored(state.right))


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


def _pooled(state: _State) -> Pooling[_State]:
    """The means over all ranks' samples."""
    factors = [state.left, state.right]
    for factor in factors:
        # Without samples, the factors are memory that nobody has written to.
        factor.mul_(state.samples) if state.samples else factor.zero_()
    yield [Sum(factors)]
    (samples,) = yield from summed(state.samples)
    return _State(state.left.div_(samples), state.right.div_(samples), samples)
