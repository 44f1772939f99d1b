"""The Kronecker product closest to a sum of two, in closed form."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kfoc.linalg.scaling import balanced, beyond, norm_of


def nearest_to_pair(
    first: tuple[Tensor, Tensor],
    second: tuple[Tensor, Tensor],
    shares: tuple[float, float] = (1.0, 1.0),
) -> tuple[Tensor, Tensor]:
    """The Kronecker product closest to the weighted sum of two, in closed form.

    The rearranged sum has rank two: with orthonormal bases of the two lefts and the two rights
    (two steps of Gram-Schmidt) it is a 2 x 2 matrix, whose singular value decomposition is the
    answer. This is Algorithm 1 on two terms, the merge of the paper's K-FOC_running.

    Args:
        first, second: (left, right) of shapes (o, o) and (i, i), each factor PSD.
        shares: positive weights of the two products in the sum.

    Returns:
        The balanced (left, right).
    """
    if not _nonzero(first) or not _nonzero(second):
        (left, right), share = (first, shares[0]) if _nonzero(first) else (second, shares[1])
        return balanced(left, right, share * norm_of(left) * norm_of(right))
    for term in (first, second):
        for factor in term:
            if not math.isfinite(norm_of(factor)):
                raise ValueError(beyond("a factor", factor.dtype, ""))
    norms, triangles = zip(*(_gram_schmidt(first[k], second[k]) for k in range(2)), strict=True)
    weights = torch.tensor(
        [shares[k] * norms[0][k] * norms[1][k] for k in range(2)], dtype=torch.float64
    )
    scale = weights.max().item()
    weights /= scale
    core = triangles[0] @ torch.diag(weights) @ triangles[1].mT
    left_vectors, sigmas, right_vectors = torch.linalg.svd(core)
    root = math.sqrt(sigmas[0].item() * scale)
    # Coefficients of the normalised terms: one more half step from the singular vectors. They are
    # inner products of PSD matrices, so they share a sign, and the sum stays PSD.
    merged = []
    for k, vector in enumerate((right_vectors[0], left_vectors[:, 0])):
        coefficients = (weights * (triangles[1 - k].mT @ vector)).abs()
        coefficients *= root / (triangles[k] @ coefficients).norm()
        a, b = (coefficients / torch.tensor(norms[k], dtype=torch.float64)).tolist()
        merged.append((first[k] * a).add_(second[k], alpha=b))
    return merged[0], merged[1]


def _nonzero(term: tuple[Tensor, Tensor]) -> bool:
    return norm_of(term[0]) * norm_of(term[1]) > 0


def _gram_schmidt(first: Tensor, second: Tensor) -> tuple[list[float], Tensor]:
    """Norms of two matrices, and the triangle R of QR = [first, second] once normalised."""
    norms = [norm_of(first), norm_of(second)]
    if all(2.0**-20 < norm < 2.0**20 for norm in norms):  # no product of two leaves the range
        along = torch.dot(first.flatten(), second.flatten()).item() / norms[0] / norms[1]
    else:
        along = torch.dot(first.flatten() / norms[0], second.flatten()).item() / norms[1]
    if along < 0.9:
        rest = math.sqrt(1 - along**2)
    else:  # the root would lose half the digits
        difference = torch.sub(second, first, alpha=along * norms[1] / norms[0])
        rest = norm_of(difference) / norms[1]
    return norms, torch.tensor([[1.0, along], [0.0, rest]], dtype=torch.float64)
