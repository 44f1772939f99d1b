"""The positive semi-definite matrix closest to a symmetric one."""

from __future__ import annotations

import torch
from torch import Tensor

from kfoc.linalg.eigen import symmetric_eigh
from kfoc.linalg.products import gram
from kfoc.nearest.contraction import positive

# From so many rows on an eigendecomposition takes so much longer than products that it is worth
# looking whether a small part of the rank, one in so many, is all there is.
LARGE = 1024
PART = 8


def on_the_cone(factor: Tensor) -> Tensor:
    """The closest positive semi-definite matrix (n, n), or non-negative diagonal (n,).

    To `n eps` of its norm, as an eigendecomposition is; a matrix that is PSD up to rounding is
    returned as it is.
    """
    if factor.ndim == 1:
        return factor.clamp_min(0)
    if positive(factor):
        return factor
    basis, within = _compressed(factor) if len(factor) >= LARGE else (None, factor)
    values, vectors = symmetric_eigh(within, "a factor")
    kept = values > 0
    half = vectors[:, kept] * values[kept].sqrt()
    return gram((half if basis is None else basis @ half).mT)


def _compressed(factor: Tensor) -> tuple[Tensor | None, Tensor]:
    """Q and `Q^T X Q`, of an orthonormal Q of few columns such that `X = Q Q^T X Q Q^T`.

    None and X itself where there is none. Q spans random combinations of X's columns (Halko,
    Martinsson & Tropp 2011), which is enough for factors of few samples, and for spectra that fall.
    Two symmetric matrices are no closer than their projections onto the cone, a convex set, so the
    projection is off by no more than what Q misses of X.
    """
    n = len(factor)
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(n, n // PART, generator=generator, dtype=torch.float64)
    basis = torch.linalg.qr(factor @ mixing.to(factor)).Q
    rows = basis.mT @ factor
    missed = torch.addmm(factor, basis, rows, alpha=-1)
    if missed.norm() > n * torch.finfo(factor.dtype).eps * factor.norm():
        return None, factor
    return basis, rows @ basis
