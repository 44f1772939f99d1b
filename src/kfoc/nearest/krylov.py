"""The leading singular triples of a contraction, from a few half steps."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from kfoc.nearest.contraction import Contraction


@dataclass(frozen=True)
class Represented:
    """`sum_j sigmas[j] vec(lefts[j]) vec(rights[j])^T`, of orthonormal factors as represented.

    Attributes:
        rest: about the largest singular value of what is left out.
    """

    lefts: list[Tensor]
    rights: list[Tensor]
    sigmas: list[float]
    rest: float


def leading_triples(contraction: Contraction, count: int, length: int) -> Represented:
    """At most `count` triples of `Q Q^T A`, Q being a basis of `A I`, `A A^T A I`, ...

    A Golub-Kahan bidiagonalisation (Golub & Kahan 1965) of `length` left factors, in coefficients
    where the contraction has them: a factor's inner product with another is then that of the one's
    coefficients with the other's image, so that no factor is formed. From the identity it finds
    what weighs most in A and in the sum of A with others like it, before it finds what is leading
    in A alone: as the next batches will be, so summing up batches loses less than by A's own
    triples.

    Few left factors, as each is orthogonalised once: rounding would leave the first in the later
    ones of many. The triples need not be exact: the sum goes on with what they leave of A.
    """
    implicit = contraction.implicit
    lefts: list[Tensor] = []
    images: list[Tensor] = []  # A^T of each
    backs: list[Tensor] = []  # A of those
    new, along = contraction.start(), [0.0]
    precision = torch.finfo(new.dtype).eps
    while True:
        image = contraction.advance(new, "left")
        squared = (new * (image if implicit else new)).sum().item()
        before = squared + sum(share * share for share in along)
        # Rounding, or all there is: the square of what is left comes from products as large as
        # those of what it is left of.
        if not squared > math.sqrt(precision) * before:
            break
        norm = math.sqrt(squared)
        lefts.append(new / norm)
        images.append(image / norm)
        last = len(lefts) == length
        if last and not implicit:
            break
        backs.append(contraction.advance(images[-1], "right"))
        if last:
            break
        along = [
            (backs[-1] * (other if implicit else left)).sum().item()
            for left, other in zip(lefts, images, strict=True)
        ]
        new = backs[-1] - _combined(lefts, along)
    contraction.forget()
    if not lefts:
        return Represented([], [], [], 0.0)
    others = backs if implicit else images
    gram = torch.tensor(
        [[(image * other).sum().item() for other in others] for image in images],
        dtype=torch.float64,
    )
    values, vectors = torch.linalg.eigh((gram + gram.mT) / 2)
    sigmas = values.clamp_min(0).sqrt().flip(0).tolist()
    shares = vectors.flip(1).mT.tolist()
    kept = sum(sigma > 1e-6 * sigmas[0] for sigma in sigmas[:count])
    return Represented(
        [_combined(lefts, shares[j]) for j in range(kept)],
        [_combined(images, [s / sigmas[j] for s in shares[j]]) for j in range(kept)],
        sigmas[:kept],
        sigmas[min(count, len(sigmas) - 1)],
    )


def _combined(parts: list[Tensor], shares: list[float]) -> Tensor:
    total = parts[0] * shares[0]
    for part, share in zip(parts[1:], shares[1:], strict=True):
        total.add_(part, alpha=share)
    return total
