"""Algorithm 1 of the paper: the Kronecker product closest to a sum of Kronecker products.

Every sum of Kronecker products `sum_k L_k (x) R_k` is, after the rearrangement of Lemma 3.1, the
matrix `A = sum_k vec(L_k) vec(R_k)^T`; the closest single product is its leading singular triple
(Lemma 3.2), found by the power iteration. How `A` is applied is left to a `Contraction`, so that
the same iteration serves explicit factors here and a layer's samples in `plans.py`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from kfoc.ambient import plainly
from kfoc.scales import check_representable

Side = Literal["left", "right"]


def opposite(side: Side) -> Side:
    return "right" if side == "left" else "left"


@dataclass(frozen=True)
class KroneckerFit:
    """The closest Kronecker product and how good it is.

    Attributes:
        left: (o, o), of Frobenius norm `sqrt(sigma)`, as is right: their product
            `torch.kron(left, right)` is the approximation, scale included.
        right: (i, i).
        sigma: the largest singular value of the rearranged sum, the norm of the approximation.
        relative_error: `||F - left (x) right||_F / ||F||_F`, or None where it was not computed.
            It comes from `||F||^2 - sigma^2`, so errors below the square root of the working
            precision (about 5e-4 in float32) are rounding.
        steps: half steps of the power iteration that were taken.
        converged: whether the estimated distance of sigma to its limit fell under `rtol`.
        plan: which contraction was used (see `plans.py`).
    """

    left: Tensor
    right: Tensor
    sigma: float
    relative_error: float | None
    steps: int
    converged: bool
    plan: str


class Contraction(ABC):
    """The rearranged sum `A` of one set of terms, as an operator on representations of factors.

    A representation is whatever the plan iterates on: the factor itself, or the coefficients of
    the factor in the terms. Sides name where a representation lives: `advance(x, "left")` takes a
    left factor to the right factor `A^T x`, and the other way round.
    """

    plan: str
    # Representations are coefficients of the factor in the terms: the inner product of two factors
    # is that of the one's representation with the other's image, as arrays.
    implicit = False
    # A half step costs next to nothing beside what has been set up: not worth saving.
    cheap_steps = False

    @property
    def certifies(self) -> bool:
        """Whether `squared_norm` comes at next to no cost."""
        return False

    @abstractmethod
    def start(self) -> Tensor:
        """A left representation: the half step from the unit factor `right = I / sqrt(i)`."""

    @property
    def reads_upper(self) -> bool:
        """Whether `apply` and `overlap` read matrices on and above the diagonal alone."""
        return False

    @abstractmethod
    def apply(self, matrix: Tensor, side: Side) -> Tensor:
        """Half step from an explicit factor on `side` to a representation on the other side."""

    @abstractmethod
    def advance(self, representation: Tensor, side: Side) -> Tensor:
        """Half step from a representation on `side` to one on the other side."""

    @abstractmethod
    def factor(self, representation: Tensor, side: Side) -> Tensor:
        """The explicit factor, (o, o) or (i, i), that a representation stands for.

        Exactly symmetric where the terms are.
        """

    def accumulate(self, total: Tensor, representation: Tensor, side: Side, scale: float) -> None:
        """`total += scale * factor`, in place, on and above the diagonal at least."""
        total.add_(self.factor(representation, side), alpha=scale)

    @abstractmethod
    def inner(self, first: Tensor, second: Tensor, side: Side) -> Tensor:
        """Frobenius inner product of the factors behind two representations, a scalar."""

    def overlap(self, representation: Tensor, matrix: Tensor, image: Tensor, side: Side) -> Tensor:
        """Inner product of a represented factor with `matrix`, whose half step is `image`."""
        return (self.factor(representation, side) * matrix).sum()

    def forget(self) -> None:  # noqa: B027  (most keep nothing)
        """Give back memory that can be formed anew: the steps are done."""

    def positive(self, representation: Tensor, side: Side) -> bool:
        """Whether the factor that a representation stands for is PSD, up to rounding."""
        return positive(self.factor(representation, side))

    @abstractmethod
    def squared_norm(self) -> float:
        """`||A||_F^2`, the squared Frobenius norm of the whole sum."""


def positive(matrices: Tensor) -> bool:
    """Whether symmetric matrices (..., n, n) are PSD, up to a little more than rounding."""
    info = torch.finfo(matrices.dtype)
    largest = matrices.diagonal(dim1=-2, dim2=-1).amax(-1, keepdim=True)
    shifted = matrices.clone()
    shifted.diagonal(dim1=-2, dim2=-1).add_(largest * (100 * info.eps) + info.tiny)
    return not torch.linalg.cholesky_ex(shifted).info.any()


@dataclass(frozen=True)
class Iterate:
    """Representations of a left and a right factor: one of unit norm, the other its exact image."""

    left: Tensor
    right: Tensor
    sigma: float
    steps: int
    converged: bool
    exact_side: Side  # of the factor that is the image of the other, and has the norm sigma
    damping: float = 1.0  # estimate of the squared ratio of the second singular value to the first

    def scales(self, sigma: float) -> tuple[float, float]:
        """What to multiply left and right by, so that each has the norm `sqrt(sigma)`."""
        root = math.sqrt(sigma)
        image = root / self.sigma if self.sigma else 0.0
        return (image, root) if self.exact_side == "left" else (root, image)


def power_iteration(
    contraction: Contraction,
    start: Tensor,
    side: Side,
    rtol: float,
    max_steps: int,
    history: Sequence[float] = (),
) -> Iterate:
    """Alternate half steps from `start` (on `side`) until sigma has settled.

    `start` is itself the half step from a factor of unit norm, so its norm is a sigma, the first
    one or the next one after those of `history`. One of the returned representations has unit
    norm, the other is its exact image, of norm sigma: so
    `||A - left right^T||^2 = ||A||^2 - sigma^2` holds for every iterate, converged or not.
    """
    precision = 4 * torch.finfo(start.dtype).eps
    current, norm = start, _norm(contraction, start, side)
    if norm == 0.0:
        image = contraction.advance(current, side)
        return _ordered(current, image, side, [0.0, 0.0], True)
    sigmas = [*history, norm]
    while True:
        image = contraction.advance(current, side) / norm
        sigma = _norm(contraction, image, opposite(side))
        sigmas.append(sigma)
        converged = settled(sigmas, rtol, precision)
        steps = len(sigmas) - 1
        if converged or steps >= max_steps or sigma == 0.0:
            return _ordered(current / norm, image, side, sigmas, converged)
        current, norm, side = image, sigma, opposite(side)


def _norm(contraction: Contraction, representation: Tensor, side: Side) -> float:
    return math.sqrt(max(contraction.inner(representation, representation, side).item(), 0.0))


def _ordered(
    current: Tensor, image: Tensor, side: Side, sigmas: list[float], converged: bool
) -> Iterate:
    left, right = (current, image) if side == "left" else (image, current)
    steps = len(sigmas) - 1
    damping = damping_of(sigmas, 4 * torch.finfo(current.dtype).eps)
    return Iterate(left, right, sigmas[-1], steps, converged, opposite(side), damping)


def damping_of(sigmas: Sequence[float], precision: float) -> float:
    """What successive rises of sigma fall by: the larger of the last two ratios, at most 1.

    Rises under the precision tell nothing, but that what was before them fell to that.
    """
    rises = [(after - before) / (after or 1.0) for before, after in pairwise(sigmas)]
    pairs = [(before, after) for before, after in pairwise(rises) if before > precision]
    ratios = [after / before for before, after in pairs if after > precision]
    if not ratios and pairs:
        ratios = [precision / pairs[-1][0]]
    return min(1.0, max(ratios[-2:], default=1.0))


def settled(
    sigmas: list[float],
    rtol: float,
    precision: float,
    least: int = 3,
    damping: float | None = None,
    floor: float = 0.0,
) -> bool:
    """Whether sigma, after `least` rises, is within `rtol` of its limit, judged from how it rose.

    The sigmas rise geometrically in the end, so what is left to rise is `c q / (1 - q)` after a
    rise c, with q the ratio of successive rises; the larger of the last two ratios is taken. That
    stops fast iterations a half step before the rise itself has vanished, and does not stop a slow
    one while much is left.

    The factors' error is the square root of sigma's. So a tolerance near the precision asks for
    the factors to rounding: that takes as many steps again as sigma took to stop rising.

    Args:
        damping: q, where it is known from elsewhere: a single rise then tells what is left.
        floor: at least so much is q taken for, where the first rises are of another kind.
    """
    rises = [(after - before) / (after or 1.0) for before, after in pairwise(sigmas)]
    if rtol < max(precision, 1e-12):
        flat = next((k for k, rise in enumerate(rises) if rise <= precision), len(rises))
        return len(rises) >= 2 * flat + 3
    if len(rises) >= 2 and rises[-1] <= precision:
        return True
    if damping is not None and rises:
        q = max(damping, damping_of(sigmas, precision) if len(rises) > 1 else 0.0)
        return q < 1 and rises[-1] * q / (1 - q) <= rtol
    if len(rises) < least:
        return False
    ratios = [after / before if before > 0 else 1.0 for before, after in pairwise(rises[-3:])]
    q = max(*ratios, floor)
    return min(ratios) > 0 and q < 1 and rises[-1] * q / (1 - q) <= rtol


def balanced(left: Tensor, right: Tensor, sigma: float) -> tuple[Tensor, Tensor]:
    """The factors of norm `sqrt(sigma)` each, in the directions given; zeros where one is zero.

    The norms are taken as Python floats, one factor at a time, so that no product of the two
    scales can overflow.
    """
    return balance(left.clone(), right.clone(), sigma)


def balance(left: Tensor, right: Tensor, sigma: float) -> tuple[Tensor, Tensor]:
    """As `balanced`, in place: a copy of a large layer's factors is what memory peaks at."""
    left_norm, right_norm = norm_of(left), norm_of(right)
    if not sigma or not left_norm or not right_norm:
        return left.zero_(), right.zero_()
    root = math.sqrt(sigma)
    return left.mul_(root / left_norm), right.mul_(root / right_norm)


def norm_of(tensor: Tensor) -> float:
    """The Frobenius norm, also of numbers whose squares leave the range of the dtype."""
    # Sums of a million squares one by one would be off by 1e-5 in float32: first by rows.
    norm = (tensor.norm(dim=1) if tensor.ndim == 2 else tensor).norm().item()
    if 1e-15 < norm < 1e15:
        return norm
    return torch.linalg.vector_norm(tensor, dtype=torch.float64).item()


def relative_error(sigma: float, total: float | None) -> float | None:
    if total is None:
        return None
    return math.sqrt(max(1.0 - sigma * sigma / total, 0.0)) if total > 0 else 0.0


class _Terms(Contraction):
    """Explicit terms: `lefts` (K, o * o) and `rights` (K, i * i), flattened."""

    plan = "terms"

    def __init__(self, lefts: Tensor, rights: Tensor) -> None:
        self._sizes = lefts.shape[1:], rights.shape[1:]
        self._flat = {"left": lefts.flatten(1), "right": rights.flatten(1)}

    def start(self) -> Tensor:
        size = self._sizes[1][0]
        return self.apply(torch.eye(size).to(self._flat["right"]) / math.sqrt(size), "right")

    def apply(self, matrix: Tensor, side: Side) -> Tensor:
        return self.advance(matrix.flatten(), side)

    def advance(self, representation: Tensor, side: Side) -> Tensor:
        return self._flat[opposite(side)].mT @ (self._flat[side] @ representation)

    def factor(self, representation: Tensor, side: Side) -> Tensor:
        return representation.reshape(self._sizes[0] if side == "left" else self._sizes[1])

    def inner(self, first: Tensor, second: Tensor, side: Side) -> Tensor:
        return first @ second

    def squared_norm(self) -> float:
        left, right = self._flat["left"], self._flat["right"]
        return ((left @ left.mT) * (right @ right.mT)).sum().item()


@plainly
def nearest_kronecker(
    lefts: Tensor, rights: Tensor, *, rtol: float = 1e-6, max_steps: int = 1000
) -> KroneckerFit:
    """The Kronecker product closest in Frobenius norm to `sum_k kron(lefts[k], rights[k])`.

    Algorithm 1 of Schnaus, Lee & Triebel (2021). The terms may be any square matrices. Where all
    are symmetric positive semi-definite, so are the returned factors; otherwise their common sign
    is chosen so that `left` has a non-negative trace.

    Args:
        lefts: (K, o, o), floating point; the factors are in float32 at least.
        rights: (K, i, i), of the same dtype and device.
        rtol: estimated relative distance of sigma to its limit at which to stop; 0: go on until
            the factors themselves have settled to rounding.
        max_steps: at most so many half steps; `converged` tells whether they sufficed.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, or values that are not finite.
    """
    _check_terms(lefts, rights)
    if lefts.element_size() < 4:
        lefts, rights = lefts.float(), rights.float()
    scales = [_scale(lefts), _scale(rights)]
    terms = _Terms(lefts / scales[0], rights / scales[1])
    iterate = power_iteration(terms, terms.start(), "left", rtol, max_steps)
    if not _all_psd(lefts, rights):
        # From the identity, an indefinite sum can be stuck in a smaller singular triple; a second
        # start, fixed but generic, is stuck there with probability zero.
        generator = torch.Generator().manual_seed(0)
        generic = torch.randn(rights[0].numel(), generator=generator, dtype=torch.float64)
        start = terms.apply((generic / generic.norm()).to(rights), "right")
        other = power_iteration(terms, start, "left", rtol, max_steps)
        iterate = other if other.sigma > iterate.sigma * (1 + rtol) else iterate
    left, right = terms.factor(iterate.left, "left"), terms.factor(iterate.right, "right")
    if _symmetric_terms(lefts) and _symmetric_terms(rights):
        left, right = (left + left.mT) / 2, (right + right.mT) / 2
    sign = -1.0 if left.diagonal().sum() < 0 else 1.0
    sigma = iterate.sigma * scales[0] * scales[1]
    check_representable(math.sqrt(sigma), lefts.dtype, "the Kronecker product")
    left, right = balanced(sign * left, sign * right, sigma)
    error = relative_error(iterate.sigma, terms.squared_norm())
    return KroneckerFit(left, right, sigma, error, iterate.steps, iterate.converged, terms.plan)


def _check_terms(lefts: Tensor, rights: Tensor) -> None:
    for name, terms in (("lefts", lefts), ("rights", rights)):
        if terms.ndim != 3 or terms.shape[-1] != terms.shape[-2] or not len(terms):
            raise ValueError(
                f"{name} must have shape (K, n, n) with K >= 1, found {tuple(terms.shape)}"
            )
        if not terms.is_floating_point():
            raise ValueError(f"{name} must be floating point, found {terms.dtype}: call .double()")
        if not terms.isfinite().all():
            raise ValueError(f"{name} has values that are not finite")
    if len(lefts) != len(rights):
        raise ValueError(
            f"lefts and rights must have the same number of terms, found {len(lefts)} and "
            f"{len(rights)}"
        )
    if lefts.dtype != rights.dtype or lefts.device != rights.device:
        raise ValueError(
            f"lefts and rights must share dtype and device, found {lefts.dtype} on {lefts.device} "
            f"and {rights.dtype} on {rights.device}"
        )


def _scale(tensor: Tensor) -> float:
    """A power of two near the largest absolute value: dividing by it loses nothing."""
    largest = tensor.abs().max().item()
    return 2.0 ** round(math.log2(largest)) if largest > 0 else 1.0


def _symmetric_terms(terms: Tensor) -> bool:
    tolerance = 16 * torch.finfo(terms.dtype).eps * terms.abs().max()
    return bool(((terms - terms.mT).abs() <= tolerance).all())


def _all_psd(lefts: Tensor, rights: Tensor) -> bool:
    if not (_symmetric_terms(lefts) and _symmetric_terms(rights)):
        return False
    for terms in (lefts, rights):
        values = torch.linalg.eigvalsh(terms)
        if (values[:, 0] < -64 * torch.finfo(terms.dtype).eps * values.abs().amax(1)).any():
            return False
    return True
