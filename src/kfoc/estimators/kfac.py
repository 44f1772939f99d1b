"""Kronecker-factored approximate curvature, the estimator everyone uses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from kfoc.blocks import KroneckerBlock
from kfoc.estimators.factored import FactoredEstimator
from kfoc.plans import CHUNK
from kfoc.products import add_symmetric, mirrored
from kfoc.samples import Samples, chunks


class _State(NamedTuple):
    left: Tensor  # means over the samples so far, on and above the diagonal
    right: Tensor
    samples: int


@dataclass(frozen=True)
class KFAC(FactoredEstimator):
    """K-FAC: inputs and output gradients taken as independent, and positions as uncorrelated.

    `right` is the second moment of the inputs summed over positions, `left` that of the output
    gradients averaged over positions (Martens & Grosse 2015; Grosse & Martens 2016, KFC, for
    convolutions and shared linear layers). One multiplication of the two gives the block.
    """

    def init_one(self, layer: str, samples: Samples) -> _State:
        o, i = samples.shape
        new_empty = samples.grads.new_empty
        return _State(new_empty(o, o), new_empty(i, i), 0)

    def update_one(self, state: _State, samples: Samples, *, alone: bool) -> _State:
        count = state.samples + samples.num_samples
        before, share = state.samples / count, 1 / count
        grads = samples.grads.reshape(-1, samples.shape[0])
        # Averaged per batch, as the number of positions may differ between batches.
        left_share = share / max(1, samples.num_positions)
        add_symmetric(state.left, grads, grads, alpha=left_share, beta=before)
        per_sample = samples.num_positions * samples.shape[1]
        for start, stop in chunks(samples, per_sample, CHUNK):
            rows = samples.inputs.columns(start, stop).flatten(1).mT
            beta = before if start == 0 else 1.0
            add_symmetric(state.right, rows, rows, alpha=share, beta=beta)
        return _State(state.left, state.right, count)

    def finish_one(self, state: _State, num_samples: int) -> KroneckerBlock:
        return KroneckerBlock(mirrored(state.left), mirrored(state.right))
