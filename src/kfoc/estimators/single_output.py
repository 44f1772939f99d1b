"""Layers with one output, whose optimum needs no iteration."""

from __future__ import annotations

import math

from torch import Tensor

from kfoc.linalg.products import add_symmetric, mirrored
from kfoc.linalg.scaling import norm_of
from kfoc.nearest.power import KroneckerFit
from kfoc.plans.base import CHUNK
from kfoc.plans.single import single_rows
from kfoc.samples.base import gradient_chunks
from kfoc.samples.linear import Samples


def solved(samples: Samples) -> KroneckerFit:
    """The Kronecker product that a mean Fisher block is where `left` is 1 x 1: the block itself.

    Args:
        samples: of a layer with one output, and a full right factor.
    """
    rescaled, scale = samples.rescaled()
    size = samples.shape[1]
    total = samples.grads.new_zeros(size, size)
    plan = "primal" if samples.num_positions == 1 else "gradients"  # its first half step alone
    if plan == "primal":
        _add_single(total, rescaled)
    else:
        for gradients in gradient_chunks(rescaled, CHUNK):
            rows = gradients.reshape(-1, size)
            add_symmetric(total, rows, rows)
    right = mirrored(total)
    # The norm is that of the rescaled sum, near one: squares of F's own may leave their range.
    norm = norm_of(right)
    sigma = norm * scale / samples.num_samples
    left = right.new_full((1, 1), math.sqrt(sigma))
    right.mul_(math.sqrt(sigma) / norm if norm else 0.0)
    return KroneckerFit(left, right, sigma, 0.0, 0, True, plan)


def _add_single(total: Tensor, samples: Samples) -> None:
    """`total += sum X^T X` for `X = g a^T`, without writing out the column of a bias."""
    values, constant = single_rows(samples.inputs)
    for grads in samples.grads[:, :, 0]:  # (N, 1)
        rows = values * grads
        if constant is None:
            add_symmetric(total, rows, rows)
            continue
        add_symmetric(total[:-1, :-1], rows, rows)
        column = total[:, -1]
        column[:-1].addmv_(rows.mT, grads[:, 0], alpha=constant)
        column[-1] += constant**2 * grads[:, 0].dot(grads[:, 0])
