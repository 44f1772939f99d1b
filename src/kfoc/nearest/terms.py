"""The Kronecker product closest to a sum of explicit terms."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kfoc.common.ambient import plainly
from kfoc.linalg.scaling import balanced, check_representable, power_of_two, wide
from kfoc.nearest.contraction import Contraction, Side, opposite
from kfoc.nearest.power import KroneckerFit, Tolerance, power_iteration, relative_error


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
    lefts, rights = wide(lefts), wide(rights)
    scales = [power_of_two(terms.abs().max().item()) for terms in (lefts, rights)]
    terms = _Terms(lefts / scales[0], rights / scales[1])
    iterate = power_iteration(terms, terms.start(), "left", Tolerance(rtol), max_steps)
    if not _all_psd(lefts, rights):
        # From the identity, an indefinite sum can be stuck in a smaller singular triple; a second
        # start, fixed but generic, is stuck there with probability zero.
        generator = torch.Generator().manual_seed(0)
        generic = torch.randn(rights[0].numel(), generator=generator, dtype=torch.float64)
        start = terms.apply((generic / generic.norm()).to(rights), "right")
        other = power_iteration(terms, start, "left", Tolerance(rtol), max_steps)
        iterate = other if other.sigma > iterate.sigma * (1 + rtol) else iterate
    left, right = terms.factor(iterate.left, "left"), terms.factor(iterate.right, "right")
    if _symmetric_terms(lefts) and _symmetric_terms(rights):
        left, right = (left + left.mT) / 2, (right + right.mT) / 2
    sign = -1.0 if left.diagonal().sum() < 0 else 1.0
    sigma = iterate.sigma * scales[0] * scales[1]
    check_representable(math.sqrt(sigma), lefts.dtype, "the Kronecker product")
    left, right = balanced(sign * left, sign * right, sigma)
    error = relative_error(iterate.sigma, terms.squared_norm())
    found = iterate.steps, iterate.converged, terms.plan, iterate.gap
    return KroneckerFit(left, right, sigma, error, *found)


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
