"""Eigendecompositions that do not fail."""

from __future__ import annotations

import torch
from torch import Tensor

from kfoc.linalg.scaling import wide


def eigh(matrix: Tensor, what: str = "the block") -> tuple[Tensor, Tensor]:
    """Eigenvalues (n,), ascending, and eigenvectors (n, n) of a positive semi-definite matrix.

    In the matrix's dtype, but float32 at least; in float64 where that fails, as it can for nearly
    singular matrices in float32. Eigenvalues that are negative by rounding become zero.

    Args:
        what: the matrix's name in errors.

    Raises:
        ValueError: values that are not finite, or an eigenvalue that is negative beyond rounding.
    """
    values, vectors = symmetric_eigh(matrix, what)
    if not values.numel():
        return values, vectors
    low, high = values[0].item(), values[-1].abs().item()
    # Sums over many samples round by more than one product does: a few times n epsilons.
    tolerance = 8 * max(len(values), 64) * torch.finfo(matrix.dtype).eps
    if low < -tolerance * max(high, abs(low)):
        raise ValueError(
            f"{what} is not positive semi-definite: its eigenvalues go from {low:.3g} to {high:.3g}"
        )
    return values.clamp_min(0), vectors


def symmetric_eigh(matrix: Tensor, what: str) -> tuple[Tensor, Tensor]:
    """As `eigh`, of any symmetric matrix, with its eigenvalues as they are."""
    if not matrix.isfinite().all():
        raise ValueError(f"{what} has values that are not finite")
    matrix = wide(matrix)
    try:
        values, vectors = torch.linalg.eigh(matrix)
        if values.isfinite().all() and vectors.isfinite().all():
            return values, vectors
    except torch.linalg.LinAlgError:
        pass
    try:
        values, vectors = torch.linalg.eigh(matrix.double())
    except torch.linalg.LinAlgError as error:
        raise ValueError(f"the eigendecomposition of {what} failed: {error}") from error
    return values.to(matrix.dtype), vectors.to(matrix.dtype)
