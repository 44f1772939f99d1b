"""The power iteration of Algorithm 1, when it has settled, and what it has found."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor

from kfoc.nearest.contraction import Contraction, Side, opposite


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
        plan: which contraction was used (see `kfoc.plans`).
    """

    left: Tensor
    right: Tensor
    sigma: float
    relative_error: float | None
    steps: int
    converged: bool
    plan: str


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
        done: whether `factor` is the last one, and what was told of it the exact image.
    """

    side: Side
    factor: Tensor
    rtol: float
    max_steps: int
    sigmas: list[float] = field(default_factory=list)
    steps: int = 0
    converged: bool = False
    done: bool = False

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
        self.converged = not sigma or settled(self.sigmas, self.rtol, precision)
        self.done = self.converged or self.steps >= self.max_steps
        if not self.done:
            self.factor, self.side = image, opposite(self.side)


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
    known = [*history, _norm(contraction, start, side)]
    it = PowerIteration(side, start, rtol, max_steps, known, len(history))
    while not it.done:
        norm, image = it.norm, contraction.advance(*it.ask()) / it.norm
        it.tell(image, _norm(contraction, image, opposite(it.side)))
    unit = it.factor / norm
    left, right = (unit, image) if it.side == "left" else (image, unit)
    damping = damping_of(it.sigmas, 4 * torch.finfo(start.dtype).eps)
    return Iterate(left, right, it.sigmas[-1], it.steps, it.converged, opposite(it.side), damping)


def _norm(contraction: Contraction, representation: Tensor, side: Side) -> float:
    return math.sqrt(max(contraction.inner(representation, representation, side).item(), 0.0))


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


def relative_error(sigma: float, total: float | None) -> float | None:
    if total is None:
        return None
    return math.sqrt(max(1.0 - sigma * sigma / total, 0.0)) if total > 0 else 0.0
