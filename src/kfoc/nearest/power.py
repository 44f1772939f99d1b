"""The power iteration of Algorithm 1, when it has settled, and what it has found."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise

import torch
from torch import Tensor

from kfoc.nearest.contraction import Contraction, Side, opposite

# By how much a block's relative error may be above the optimum's, where nothing else is asked for:
# far less than what another draw of the labels changes (benchmarks/README.md).
EXCESS = 1e-4

# Distances of sigma that this is never taken to mean less or more than: errors near zero are
# rounding, and an iteration far from its limit cannot tell how far.
LEAST, MOST = 1e-6, 0.05


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
        gap: that distance, relatively: an estimate, of what later half steps would still gain.
        plan: which contraction was used (see `kfoc.plans`).
    """

    left: Tensor
    right: Tensor
    sigma: float
    relative_error: float | None
    steps: int
    converged: bool
    plan: str
    gap: float = 0.0


@dataclass(frozen=True)
class Tolerance:
    """How near sigma has to come to its limit.

    Attributes:
        rtol: relatively; None: so near that the block's relative error is within `excess` of the
            optimum's.
        total: `||A||^2`, where it is known.
    """

    rtol: float | None
    total: float | None = None
    excess: float = EXCESS

    def under(self, bound: float) -> bool:
        """Whether less than this is asked for."""
        return self.rtol is not None and self.rtol < bound

    def tighter(self, times: float) -> Tolerance:
        return replace(self, rtol=self.rtol and self.rtol / times, excess=self.excess / times)

    def at(self, sigma: float, damping: float) -> float:
        """The relative distance to be under.

        Args:
            damping: estimate of the squared ratio of the second singular value to the first.
        """
        if self.rtol is not None:
            return self.rtol
        # Of a total that is not known, the two largest singular values: the error is no less, and
        # what it allows neither.
        total = sigma * sigma * (1 + damping) if self.total is None else self.total
        error = relative_error(sigma, total) or 0.0
        # With x the distance, the optimum's squared error is less by 2 x (1 - error^2).
        allowed = self.excess * (2 * error - self.excess) / 2
        return min(max(allowed / max(1 - error**2, EXCESS), LEAST), MOST)


@dataclass(frozen=True)
class Iterate:
    """Representations of a left and a right factor: one of unit norm, the other its exact image."""

    left: Tensor
    right: Tensor
    sigma: float
    steps: int
    converged: bool
    damping: float = 1.0  # estimate of the squared ratio of the second singular value to the first
    gap: float = 0.0  # estimate of sigma's relative distance to its limit


@dataclass
class PowerIteration:
    """The power iteration between two half steps, for whoever can take them: it can be saved there.

    Attributes:
        side: of `factor`.
        factor: what the next half step is from, or a representation of it, of the norm `norm`. It
            is not brought to unit norm: contractions keep the image of the tensor they know.
        max_steps: at most so many are taken, and one at the least.
        sigmas: the norms of the images, and what was known before.
        converged: whether sigma has settled.
        gap: estimate of its relative distance to its limit.
        done: whether `factor` is the last one, and what was told of it the exact image.
    """

    side: Side
    factor: Tensor
    tolerance: Tolerance
    max_steps: int
    sigmas: list[float] = field(default_factory=list)
    steps: int = 0
    converged: bool = False
    done: bool = False
    gap: float = 0.0

    @property
    def norm(self) -> float:
        return (self.sigmas[-1] if self.sigmas else 0.0) or 1.0

    def ask(self) -> tuple[Tensor, Side]:
        """What to take a half step from, and its side."""
        return self.factor, self.side

    def tell(self, image: Tensor, sigma: float) -> None:
        """The image of what was asked for, in units of its `norm`, and the norm of that image."""
        self.sigmas.append(sigma)
        self.steps += 1
        precision = 4 * torch.finfo(image.dtype).eps
        self.gap = remaining(self.sigmas, precision)
        rtol = self.tolerance.at(sigma, damping_of(self.sigmas, precision))
        self.converged = settled(self.sigmas, rtol, precision, self.gap)
        self.done = self.converged or self.steps >= self.max_steps
        if not self.done:
            self.factor, self.side = image, opposite(self.side)


def power_iteration(
    contraction: Contraction,
    start: Tensor,
    side: Side,
    tolerance: Tolerance,
    max_steps: int,
    history: Sequence[float] = (),
) -> Iterate:
    """Alternate half steps from `start` (on `side`) until sigma has settled.

    `start` is itself the half step from a factor of unit norm, so its norm is a sigma, the first
    one or the next one after those of `history`. One of the returned representations has unit
    norm, the other is its exact image, of norm sigma: so
    `||A - left right^T||^2 = ||A||^2 - sigma^2` holds for every iterate, converged or not.
    """
    known = [*history, _norm(contraction, start, side)]
    it = PowerIteration(side, start, tolerance, max_steps, known, len(history))
    while not it.done:
        norm, image = it.norm, contraction.advance(*it.ask()) / it.norm
        it.tell(image, _norm(contraction, image, opposite(it.side)))
    unit = it.factor / norm
    left, right = (unit, image) if it.side == "left" else (image, unit)
    damping = damping_of(it.sigmas, 4 * torch.finfo(start.dtype).eps)
    return Iterate(left, right, it.sigmas[-1], it.steps, it.converged, damping, it.gap)


def _norm(contraction: Contraction, representation: Tensor, side: Side) -> float:
    return math.sqrt(max(contraction.inner(representation, representation, side).item(), 0.0))


def damping_of(sigmas: Sequence[float], precision: float) -> float:
    """What successive rises of sigma fall by: the larger of the last two ratios, at most 1.

    Rises under the precision tell nothing, but that what was before them fell to that.
    """
    rises = _rises(sigmas)
    pairs = [(before, after) for before, after in pairwise(rises) if before > precision]
    ratios = [after / before for before, after in pairs if after > precision]
    if not ratios and pairs:
        ratios = [precision / pairs[-1][0]]
    return min(1.0, max(ratios[-2:], default=1.0))


def settled(sigmas: list[float], rtol: float, precision: float, gap: float) -> bool:
    """Whether sigma is within `rtol` of its limit, which it is `gap` away from.

    The factors' error is the square root of sigma's. So a tolerance near the precision asks for
    the factors to rounding: that takes as many steps again as sigma took to stop rising.
    """
    if rtol < max(precision, 1e-12) and sigmas[-1]:
        rises = _rises(sigmas)
        flat = next((k for k, rise in enumerate(rises) if rise <= precision), len(rises))
        return len(rises) >= 2 * flat + 3
    return gap <= rtol


def remaining(
    sigmas: list[float],
    precision: float,
    least: int = 3,
    damping: float | None = None,
    floor: float = 0.0,
) -> float:
    """What is left for sigma to rise, relatively, judged from how it rose, after `least` rises.

    The sigmas rise geometrically in the end, so what is left to rise is `c q / (1 - q)` after a
    rise c, with q the ratio of successive rises; the larger of the last two ratios is taken. That
    stops fast iterations a half step before the rise itself has vanished, and does not stop a slow
    one while much is left.

    Args:
        damping: q, where it is known from elsewhere: a single rise then tells what is left.
        floor: at least so much is q taken for, where the first rises are of another kind.

    Returns:
        inf where that cannot be told yet; 0 where rises have fallen to the precision, or for zero.
    """
    rises = _rises(sigmas)
    if not sigmas[-1] or (len(rises) >= 2 and rises[-1] <= precision):
        return 0.0
    if damping is not None and rises:
        q = max(damping, damping_of(sigmas, precision) if len(rises) > 1 else 0.0)
    elif len(rises) >= least:
        ratios = [after / before if before > 0 else 1.0 for before, after in pairwise(rises[-3:])]
        q = max(*ratios, floor) if min(ratios) > 0 else 1.0
    else:
        return math.inf
    return rises[-1] * q / (1 - q) if q < 1 else math.inf


def _rises(sigmas: Sequence[float]) -> list[float]:
    return [(after - before) / (after or 1.0) for before, after in pairwise(sigmas)]


def relative_error(sigma: float, total: float | None) -> float | None:
    if total is None:
        return None
    return math.sqrt(max(1.0 - sigma * sigma / total, 0.0)) if total > 0 else 0.0
