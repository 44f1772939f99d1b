"""The solver: the leading pair of a contraction of PSD terms, in as few half steps as possible.

The power iteration of Algorithm 2 needs many half steps where the second singular value is near
the first. What it has computed serves better: the best combination of the last factors, by a
Rayleigh-Ritz step, converges like the root (locally optimal conjugate gradients, Knyazev 2001).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from itertools import combinations_with_replacement, pairwise

import torch
from torch import Tensor

from kfoc.linalg.scaling import balance, norm_of, power_of_two
from kfoc.nearest.contraction import Contraction, Side
from kfoc.nearest.power import (
    Iterate,
    KroneckerFit,
    Tolerance,
    damping_of,
    power_iteration,
    relative_error,
    remaining,
)

# The power iteration goes on for so many half steps where these are expected to suffice: fewer than
# the acceleration takes at least, with and without implicit representations.
SOON = {True: 1, False: 2}

# Where the norm is known, so many times less is allowed: what is left is estimated from few rises,
# and low. What the second singular value allows, where it is not, is less anyway.
CAUTION = 4

# Where half steps cost next to nothing, they go on until so many times less is left.
TIMES = 10

# Three factors of either side are kept: beyond so many numbers each, that is too much memory.
BASIS_LIMIT = 2**21


@dataclass(frozen=True)
class Start:
    """Where a solve begins, if not at the half step from the identity.

    Attributes:
        left: the half step from a right factor of unit norm.
        steps: half steps taken until there.
        damping: an estimate of the squared ratio of the second singular value to the first.
    """

    left: Tensor
    steps: int
    damping: float


def leading_pair(
    contraction: Contraction, tolerance: Tolerance, max_steps: int, begun: Start | None = None
) -> Iterate:
    """The leading pair from the deterministic start, the half step from the identity.

    That start is PSD and has a positive inner product with every PSD optimum, so it cannot be
    orthogonal to it. The first half steps are the power iteration's, and where sigma has settled
    by then, or soon will have, that is all. Beyond, each two half steps give the best left factor
    among combinations of the present one x, its image under A A^T, and the direction of the last
    change. Such a combination may leave the PSD cone; what is returned is its right image and the
    left image of that, as every half step draws it back, and it is looked after: the power
    iteration, which never leaves the cone, takes over where the right image is not PSD.
    """
    start = begun.left if begun else contraction.start()
    damping = begun.damping if begun else None
    precision = 4 * torch.finfo(start.dtype).eps
    # Rises of sigma cannot show when factors have settled to rounding, only how long they take.
    settle = tolerance.under(max(precision, 1e-12))
    if contraction.cheap_steps and tolerance.rtol is None:
        tolerance = tolerance.tighter(TIMES)
    if settle or max_steps < 5 or contraction.cheap_steps:
        return power_iteration(contraction, start, "left", tolerance, max_steps)
    krylov = _Krylov(contraction, start, begun.steps if begun else 0)
    sigmas = krylov.first_sigmas()
    gap = remaining(sigmas, precision, damping=damping)
    if tolerance.rtol is None and tolerance.total is not None:
        tolerance = tolerance.tighter(CAUTION)
    rtol = tolerance.at(sigmas[-1], damping_of(sigmas, precision))
    if gap <= rtol:
        return krylov.first_pair(sigmas, gap)
    # What the chain has computed is not thrown away: the power iteration goes on from its end.
    if max(x.numel() for x in krylov.chain) > BASIS_LIMIT:
        return krylov.continued(sigmas, tolerance, max_steps)
    soon = SOON[contraction.implicit]
    if _left(sigmas, rtol) <= soon:
        found = krylov.continued(sigmas, tolerance, min(max_steps, krylov.before + 3 + soon))
        if found.converged or found.steps >= max_steps:
            return found
        krylov = _Krylov(contraction, found.left, found.steps)
        sigmas = krylov.first_sigmas()
    values = [sigmas[1]]
    while True:
        sigma, damping = krylov.improve(precision)
        values.append(sigma)
        # The values are those of left factors and their images. What is returned is a half step
        # further on, which brings what is left down by the damping.
        gap = remaining(values, precision, least=2, floor=0.05) * damping
        converged = gap <= tolerance.at(sigma, damping)
        if converged or krylov.steps + 2 > max_steps:
            break
        krylov.extend()
    # From the start again: what is outside the cone may be near another singular pair.
    pair = krylov.pair(values[-1], converged, damping, gap)
    return pair or power_iteration(contraction, start, "left", tolerance, max_steps)


def _left(sigmas: list[float], rtol: float) -> float:
    """How many half steps more the power iteration is expected to take, from its last rises."""
    rises = [(after - before) / after for before, after in pairwise(sigmas[-4:])]
    if not min(rises) > 0:
        return math.inf
    ratio = max(after / before for before, after in pairwise(rises))
    if ratio >= 1:
        return math.inf
    remaining = rises[-1] * ratio / (1 - ratio)
    return math.log(rtol / remaining) / math.log(ratio)


class _Krylov:
    """Left factors with their images: `[x, A^T x]`, and `A A^T x` behind them where implicit.

    Implicit representations need one image more than explicit ones for the same inner products.
    """

    def __init__(self, contraction: Contraction, start: Tensor, steps: int = 0) -> None:
        self.contraction = contraction
        self.length = 3 if contraction.implicit else 2
        self.before = self.steps = steps
        self.unit = 1.0
        self.chain = self._chain(start)
        # Of the norm that inner products of implicit representations give, in these units.
        self.root = math.sqrt(self.unit) if contraction.implicit else 1.0
        self.shapes = [x.shape for x in self.chain[:2]]
        self.basis: list[Tensor] = []  # per level, as rows: the current one, new, last change

    def _chain(self, start: Tensor) -> list[Tensor]:
        """The start and its images, in units of sigma where powers of it might leave the range.

        Inner products along the chain have up to the eighth power of sigma.
        """
        self.start_unit = power_of_two(norm_of(start))
        chain = self._images([start / self.start_unit if self.start_unit != 1.0 else start], 3)
        norms = norm_of(chain[0]), norm_of(chain[2])
        self.unit = power_of_two(math.sqrt(norms[1] / norms[0])) if all(norms) else 1.0
        if self.unit != 1.0:
            chain[1] = chain[1] / self.unit
            chain[2] = chain[2] / self.unit / self.unit
        return self._images(chain, self.length + 2)

    def _images(self, chain: list[Tensor], length: int) -> list[Tensor]:
        """The chain, which starts on the left, continued by half steps."""
        while len(chain) < length:
            side: Side = "left" if len(chain) % 2 else "right"
            image = self.contraction.advance(chain[-1], side)
            chain.append(image / self.unit if self.unit != 1.0 else image)
            self.steps += 1
        return chain

    def _norm(self, level: int) -> float:
        other = self.chain[level + self.contraction.implicit]
        return math.sqrt(max(torch.dot(self.chain[level].flatten(), other.flatten()).item(), 0.0))

    def first_sigmas(self) -> list[float]:
        """Sigma after the start and each of three half steps of the power iteration."""
        norms = [self._norm(level) for level in range(4)]
        ratios = [self.unit * b / a if a else 0.0 for a, b in pairwise(norms)]
        return [self.start_unit * self.root * norms[0], *ratios]

    def first_pair(self, sigmas: list[float], gap: float) -> Iterate:
        """What the power iteration ends with after three half steps."""
        norm = (self._norm(2) or 1.0) * self.root
        left, right = self.chain[2] / norm, self.chain[3] * (self.unit / norm)
        damping = damping_of(sigmas, 4 * torch.finfo(left.dtype).eps)
        return Iterate(left, right, sigmas[-1], self.before + 3, True, damping, gap)

    def continued(self, sigmas: list[float], tolerance: Tolerance, max_steps: int) -> Iterate:
        """The power iteration, from where the chain ends."""
        end = len(self.chain) - 1
        side: Side = "right" if end % 2 else "left"
        start = self.chain[end] * (self.unit / (self._norm(end - 1) * self.root))
        limit, history = max_steps - self.before, sigmas[:end]
        found = power_iteration(self.contraction, start, side, tolerance, limit, history=history)
        return replace(found, steps=found.steps + self.before)

    def improve(self, precision: float) -> tuple[float, float]:
        """Make the Ritz vector the current one, of unit norm.

        Returns:
            its sigma, and the squared ratio of the second singular value to the first.
        """
        if not self.basis:
            pairs = zip(self.chain[: self.length], self.chain[2:], strict=True)
            self.basis = [torch.stack([x, new, torch.zeros_like(x)]).flatten(1) for x, new in pairs]
            self.chain = []
        # In the end the image is nearly a multiple of the current one: what it adds would be lost
        # in the rounding of the Gram matrix, if that multiple were not taken off before.
        shares = self._products(0)[0].tolist()
        for rows in self.basis:
            rows[1].mul_(shares[0] / shares[1]).sub_(rows[0])
        # All levels are combined with the same weights, A being linear: no half step is needed.
        theta, second, weights = _ritz(self._products(0), self._products(1), precision)
        both = torch.stack([weights, weights])
        both[1, 0] = 0.0  # the change: what was added to the current one
        for rows in self.basis:
            rows[::2] = both.to(rows) @ rows
        return self.unit * math.sqrt(theta), max(second / theta, 0.1) if theta else 1.0

    def _products(self, level: int) -> Tensor:
        """Inner products of the basis, (3, 3), of the factors on one level."""
        first, second = self.basis[level], self.basis[level + self.contraction.implicit]
        # One by one: a matrix product is slow where all its sides but one are this short.
        upper = [
            torch.dot(first[a], second[b]) for a, b in combinations_with_replacement(range(3), 2)
        ]
        xx, xn, xc, nn, nc, cc = torch.stack(upper).tolist()
        rows = [[xx, xn, xc], [xn, nn, nc], [xc, nc, cc]]
        return torch.tensor(rows, dtype=torch.float64)

    def _current(self, level: int) -> Tensor:
        return self.basis[level][0].view(self.shapes[level % 2])

    def extend(self) -> None:
        """The next direction, `A A^T` of the current one: two half steps."""
        if self.contraction.implicit:
            image = self._current(2)
        else:
            image = self._images([self._current(0), self._current(1)], 3)[-1]
        for rows, new in zip(self.basis, self._images([image], self.length), strict=True):
            rows[1] = new.flatten()

    def pair(self, sigma: float, converged: bool, damping: float, gap: float) -> Iterate | None:
        """The current right factor, of unit norm, with its left image; None if it is not PSD."""
        right = self._current(1) * (self.unit / (sigma * self.root))
        if not self.contraction.positive(right, "right"):
            return None
        if self.contraction.implicit:
            left = self._current(2) * (self.unit**2 / (sigma * self.root))
        else:
            left = self.contraction.advance(right, "right")
            sigma = left.norm().item()
            self.steps += 1
        return Iterate(left, right, sigma, self.steps, converged, damping, gap)


def _ritz(gram: Tensor, image: Tensor, precision: float) -> tuple[float, float, Tensor]:
    """The two largest `c^T image c` for `c^T gram c = 1`, and the first's c.

    The first weight is not negative. With a single direction, its value stands for both.
    Directions that have vanished in rounding get no weight.
    """
    # In the end new and change are tiny beside the current one, and hardly differ in direction: at
    # unit norms the first does no harm, and the eigenvalues tell the second from rounding.
    norms = gram.diagonal().clamp_min(0).sqrt()
    kept = norms > math.sqrt(precision) * norms[0]
    inverse = torch.where(kept, 1 / norms, 0.0)
    values, vectors = torch.linalg.eigh(gram * inverse * inverse[:, None])
    good = values > precision
    whitened = inverse[:, None] * vectors[:, good] / values[good].sqrt()
    thetas, rotation = torch.linalg.eigh(whitened.mT @ image @ whitened)
    weights = whitened @ rotation[:, -1]
    weights = -weights if weights[0] < 0 else weights
    first, second = thetas[-1].item(), thetas[-min(2, len(thetas))].item()
    return max(first, 0.0), max(second, 0.0), weights


def fit_contraction(
    contraction: Contraction,
    *,
    rtol: float | None,
    max_steps: int,
    certify: bool = True,
    scale: float = 1.0,
    begun: Start | None = None,
) -> KroneckerFit:
    """Solve a contraction of positive semi-definite terms.

    Args:
        rtol: see `Tolerance`.
        certify: whether to say what the relative error is, also where that is not cheap.
        scale: what the sum is `scale` times the contraction of.
        begun: None: from the deterministic start.
    """
    total = contraction.squared_norm() if certify or contraction.certifies else None
    iterate = leading_pair(contraction, Tolerance(rtol, total), max_steps, begun)
    contraction.forget()
    left = contraction.factor(iterate.left, "left")
    right = contraction.factor(iterate.right, "right")
    # An implicit image's norm is known from the factor, or else a half step later.
    sigma = norm_of(left) * norm_of(right)
    left, right = balance(left, right, sigma * scale)
    return KroneckerFit(
        left,
        right,
        sigma * scale,
        relative_error(sigma, total),
        iterate.steps,
        iterate.converged,
        contraction.plan,
        iterate.gap,
    )
