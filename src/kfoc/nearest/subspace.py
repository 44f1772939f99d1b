"""The closest sum of r Kronecker products: subspace iteration on the rearranged sum.

The rearrangement A of a symmetric matrix commutes with transposing both factors, so its singular
vectors are symmetric or antisymmetric matrices, in pairs of the same symmetry. The two are iterated
separately, each in coordinates of its own, which keeps every factor exactly of its symmetry, and
with it the sum symmetric.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kfoc.nearest.power import Tolerance, remaining, settled


class HalfSteps(ABC):
    """A, of size (o^2, i^2), as an operator on stacks of factors."""

    symmetric: bool  # every term has symmetric factors, so that A takes antisymmetric ones to zero

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int]:
        """(o, i)."""

    @abstractmethod
    def to_left(self, rights: Tensor) -> Tensor:
        """`A` times each of (k, i, i); (k, o, o)."""

    @abstractmethod
    def to_right(self, lefts: Tensor) -> Tensor:
        """`A^T` times each of (k, o, o); (k, i, i)."""


@dataclass(frozen=True)
class Matrix(HalfSteps):
    """A itself, (o^2, i^2)."""

    matrix: Tensor
    size: tuple[int, int]
    symmetric: bool = False

    @property
    def shape(self) -> tuple[int, int]:
        return self.size

    def to_left(self, rights: Tensor) -> Tensor:
        return (rights.flatten(1) @ self.matrix.mT).view(-1, self.size[0], self.size[0])

    def to_right(self, lefts: Tensor) -> Tensor:
        return (lefts.flatten(1) @ self.matrix).view(-1, self.size[1], self.size[1])


@dataclass(frozen=True)
class Singular:
    """Singular triples of A.

    Attributes:
        lefts: (k, o, o), orthonormal.
        rights: (k, i, i), orthonormal.
        sigmas: (k,), falling.
        steps: half steps taken.
        converged: whether the norm of the leading sigmas settled.
        gap: estimate of its relative distance to its limit.
    """

    lefts: Tensor
    rights: Tensor
    sigmas: Tensor
    steps: int = 0
    converged: bool = True
    gap: float = 0.0

    def exchanged(self) -> Singular:
        """With the two sides exchanged."""
        return replace(self, lefts=self.rights, rights=self.lefts)

    def terms(self, rank: int, scale: float = 1.0) -> tuple[Tensor, Tensor]:
        """The leading `rank` terms, times `scale`, as balanced factors with a common sign."""
        # Roots one by one, so that small scales do not underflow.
        roots = (self.sigmas[:rank].clamp_min(0).sqrt() * math.sqrt(scale))[:, None, None]
        lefts, rights = self.lefts[:rank], self.rights[:rank]
        traces = lefts.diagonal(dim1=1, dim2=2).sum(1)
        signs = torch.where(traces < 0, -1.0, 1.0)[:, None, None].to(roots)
        return lefts * roots * signs, rights * roots * signs


def coordinates(stack: Tensor, sign: int) -> Tensor:
    """The symmetric (sign 1) or antisymmetric (-1) parts of (k, n, n), orthonormally; (d, k)."""
    part = (stack + sign * stack.mT) / 2
    rows, columns = _indices(stack.shape[-1], sign, stack.device)
    return part[:, rows, columns].mT * _weights(rows, columns, stack)[:, None]


def matrices(columns: Tensor, size: int, sign: int) -> Tensor:
    """The matrices (k, n, n) with the coordinates (d, k)."""
    rows, cols = _indices(size, sign, columns.device)
    values = (columns / _weights(rows, cols, columns)[:, None]).mT
    stack = columns.new_zeros(columns.shape[1], size, size)
    stack[:, cols, rows] = sign * values
    stack[:, rows, cols] = values
    return stack


def _indices(size: int, sign: int, device: torch.device) -> tuple[Tensor, Tensor]:
    found = torch.triu_indices(size, size, offset=0 if sign > 0 else 1, device=device)
    return found[0], found[1]


def _weights(rows: Tensor, columns: Tensor, like: Tensor) -> Tensor:
    return torch.where(rows == columns, 1.0, 2.0).to(like).sqrt()


def dimension(size: int, sign: int) -> int:
    """Of the symmetric or antisymmetric matrices."""
    return size * (size + sign) // 2


def starts(shape: tuple[int, int], count: int, sign: int, like: Tensor) -> Tensor:
    """Orthonormal right factors to start from, (k, i, i): the identity, and fixed random ones."""
    o, i = shape
    count = min(count, dimension(o, sign), dimension(i, sign))
    generator = torch.Generator().manual_seed(0)
    stack = torch.randn(count, i, i, generator=generator, dtype=torch.float64)
    if sign > 0 and count:
        stack[0] = torch.eye(i, dtype=torch.float64)
    return orthonormal(stack, sign).to(like)


def orthonormal(stack: Tensor, sign: int) -> Tensor:
    """An orthonormal basis of symmetric (sign 1) or antisymmetric matrices (k, n, n)."""
    return matrices(torch.linalg.qr(coordinates(stack, sign))[0], stack.shape[-1], sign)


def leading(
    steps: HalfSteps, rank: int, count: int, *, rtol: float | None, max_steps: int, like: Tensor
) -> Singular:
    """The leading `count` singular triples of A, of which the first `rank` have to settle.

    Subspace iteration with `count` columns for each symmetry; more of them than `rank` make it
    faster. It stops as the power iteration does, by the norm of the leading sigmas.
    """
    found = [
        leading_of(steps, sign, rank, count, rtol=rtol, max_steps=max_steps, like=like)
        for sign in ((1,) if steps.symmetric else (1, -1))
    ]
    return combined([part for part in found if part is not None], count)


def leading_of(
    steps: HalfSteps,
    sign: int,
    rank: int,
    count: int,
    *,
    rtol: float | None,
    max_steps: int,
    like: Tensor,
) -> Singular | None:
    """As `leading`, of one symmetry; None where there are no matrices of it."""
    rights = starts(steps.shape, count, sign, like)
    if not len(rights):
        return None
    precision = 4 * torch.finfo(like.dtype).eps
    norms: list[float] = []
    while True:
        lefts = orthonormal(steps.to_left(rights), sign)
        found = refined(lefts, steps.to_right(lefts), sign)
        norms.append(found.sigmas[:rank].norm().item())
        gap = remaining(norms, precision)
        total = found.sigmas.square().sum().item()  # of the norm, what is known of it
        converged = settled(norms, Tolerance(rtol, total).at(norms[-1], 0.0), precision, gap)
        taken = 2 * len(norms)
        if converged or taken >= max_steps:
            return Singular(found.lefts, found.rights, found.sigmas, taken, converged, gap)
        rights = found.rights


def refined(fixed: Tensor, images: Tensor, sign: int) -> Singular:
    """Singular triples from orthonormal left factors and their images under A^T.

    With the two sides exchanged, from right factors and their images under A: then `lefts` of the
    result are right factors.
    """
    image = coordinates(images, sign)
    vectors, sigmas, mixing = torch.linalg.svd(image, full_matrices=False)
    # In coordinates: of sums of whole matrices, those above the diagonal may round differently.
    mixed = matrices(coordinates(fixed, sign) @ mixing.mT, fixed.shape[-1], sign)
    return Singular(mixed, matrices(vectors, images.shape[-1], sign), sigmas)


def combined(found: Sequence[Singular], count: int) -> Singular:
    """The triples of both symmetries, by falling sigma."""
    sigmas = torch.cat([part.sigmas for part in found])
    order = sigmas.argsort(descending=True, stable=True)[:count]
    return Singular(
        torch.cat([part.lefts for part in found])[order],
        torch.cat([part.rights for part in found])[order],
        sigmas[order],
        max(part.steps for part in found),
        all(part.converged for part in found),
        max(part.gap for part in found),
    )
