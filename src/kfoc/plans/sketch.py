"""A start near the optimum, from a small problem that is nearly the same one.

Per-sample gradients are of low numerical rank, and a factor sums their squares, so that what is
small in them hardly shows in it. So the samples are reduced: for several positions, every gradient
to a few directions of its own (randomised singular value decomposition, Halko, Martinsson & Tropp
2011), for one position, inputs and gradients to a few directions in common. The reduced problem is
solved, and of its factor on the layer's larger side a low-rank sketch is made (Nystrom). Two half
steps over all samples, which form the two factors once as K-FAC does, then reach the optimum as a
rule: the first is cheap, as its factor is of low rank, and the second is on the smaller side.
Whether they did is checked: by what the two have changed, which costs nothing, and where that does
not tell, by what a third one would change, along a few random directions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from kfoc.linalg.products import orthonormal
from kfoc.linalg.scaling import norm_of
from kfoc.nearest.accelerated import Start, fit_contraction, leading_pair
from kfoc.nearest.contraction import Side, opposite
from kfoc.nearest.power import KroneckerFit, Tolerance, relative_error
from kfoc.plans.base import Formed
from kfoc.plans.explicit import Gradients
from kfoc.plans.positions import PositionGram, Positions
from kfoc.plans.single import Primal
from kfoc.plans.sketch_cost import PROBES, ROWS
from kfoc.samples.inputs import Rows
from kfoc.samples.linear import Samples

# Half steps that the reduced problem may take.
MAX_STEPS = 40

# Half steps that may follow the two: beyond, the accelerated solver is faster.
MORE = 2

# The reduced problem is solved so many times nearer than what is asked for, as the reduction has an
# error too, and as only what has settled tells how fast.
TIMES = 8

# Sketches for tolerances below this take steps of subspace iteration: others do not need what these
# cost.
FINE = 1e-5
PASSES = 2

# Singular values are not taken to be further apart than this, squared: the estimate is from below.
LEAST_DAMPING = 0.3

# Singular values as close as this might change places in the reduced problem.
CLOSEST = 0.9


Sketchable = Primal | Positions | Gradients


@dataclass(frozen=True)
class Sketch:
    """A factor near the optimum's, `rows^T rows` on `side`.

    Attributes:
        rows: (r, n).
        damping: estimate of the squared ratio of the second singular value to the first.
        rtol: how near sigma has to come to its limit, relatively.
    """

    rows: Tensor
    side: Side
    damping: float
    rtol: float


def fit_from_sketch(
    contraction: Sketchable,
    shape: tuple[int, int],
    rank: int,
    *,
    rtol: float | None,
    max_steps: int,
    certify: bool,
    scale: float,
) -> KroneckerFit:
    """As `fit_contraction`, from a sketch.

    Args:
        shape: (o, i).
        rank: directions that samples are reduced to.
    """
    sketch, near = sketched(contraction, shape, rank, Tolerance(rtol))
    found = formed(contraction, sketch) if sketch else None
    if not isinstance(found, Pair):
        return fit_contraction(
            contraction,
            rtol=near,
            max_steps=max_steps,
            certify=certify,
            scale=scale,
            begun=found,
        )
    total = contraction.squared_norm() if certify else None
    contraction.forget()
    sigma = found.sigma * scale
    root = math.sqrt(sigma)
    first = found.first.mul_(root / found.norm)
    second = found.second.mul_(root / found.sigma / found.norm)
    left, right = (second, first) if found.side == "left" else (first, second)
    error = relative_error(found.sigma, total)
    return KroneckerFit(left, right, sigma, error, found.steps, True, contraction.plan, found.gap)


def sketched(
    contraction: Sketchable, shape: tuple[int, int], rank: int, tolerance: Tolerance
) -> tuple[Sketch | None, float | None]:
    """A sketch of the factor on the larger side; None where none can be relied on.

    Beside it, how near sigma has to come to its limit, as far as the reduced problem tells.
    """
    side: Side = "left" if shape[0] > shape[1] else "right"
    bases: dict[Side, Tensor | None] = {}
    inner: Primal | PositionGram
    if isinstance(contraction, Primal):
        projected = contraction.projected(rank)
        if projected is None:
            return None, tolerance.rtol
        reduced, bases = projected
        inner = Primal(reduced)
    else:
        passes = PASSES if tolerance.under(FINE) else 0
        reduced, lost = truncated(contraction, shape[1], rank, passes)
        inner = PositionGram(reduced)
        if inner.certifies:
            tolerance = replace(tolerance, total=inner.squared_norm() + lost)
    precision = 4 * torch.finfo(reduced.grads.dtype).eps
    inner_tolerance = tolerance.tighter(TIMES)
    if inner_tolerance.rtol is not None:
        # Under the precision the solver would go on until the factors have settled.
        inner_tolerance = Tolerance(max(inner_tolerance.rtol, 1.1 * precision))
    found = leading_pair(inner, inner_tolerance, MAX_STEPS)
    if not found.converged or not found.sigma or found.damping > CLOSEST:
        near = tolerance.at(found.sigma, found.damping) if tolerance.total else tolerance.rtol
        return None, near
    representation = found.left if side == "left" else found.right
    if isinstance(inner, Primal):
        rows = _root(inner.factor(representation, side), bases[side])
    else:
        rows = _nystrom(inner, representation, side)
    near = tolerance.at(found.sigma, found.damping)
    return Sketch(rows, side, max(found.damping, LEAST_DAMPING), near), near


def truncated(
    contraction: Positions | Gradients, width: int, rank: int, passes: int = 0
) -> tuple[Samples, float]:
    """The samples with every per-sample gradient near `P Q^T` of that rank: as `rank` positions.

    Args:
        passes: steps of subspace iteration, as gradients' singular values fall slowly.

    Returns:
        The samples, and about what `||F||^2` has that theirs lacks: what gradients lose of their
        squares, but not of their inner products with one another.
    """
    directions = _normal(width, rank, seed=0, like=contraction.like)
    found = contraction.carried(directions, "right")
    whole = found.square().sum((1, 2), dtype=torch.float64) / rank
    for _ in range(passes):
        again = contraction.carried(orthonormal(found.mT).mT, "left")
        found = contraction.carried(again, "right")
    left = orthonormal(found.mT)  # (M, k, o)
    right = contraction.carried(left.mT, "left").mT
    kept = right.square().sum((1, 2), dtype=torch.float64)
    lost = (whole.square() - kept.square()).clamp_min(0).sum().item()
    return Samples(Rows(right.contiguous()), left.contiguous()[None]), lost


def _root(factor: Tensor, basis: Tensor | None) -> Tensor:
    """Rows R such that `R^T R` is the factor, which is in coordinates of the basis."""
    values, vectors = torch.linalg.eigh(factor)
    rows = values.clamp_min(0).sqrt()[:, None] * vectors.mT
    rows = _unit(rows)
    if basis is None:
        return rows
    # The column of ones of a bias, if there is one, is a coordinate of its own.
    inner = rows[:, : len(basis)] @ basis
    return torch.cat([inner, rows[:, len(basis) :]], 1)


def _nystrom(contraction: Positions, representation: Tensor, side: Side) -> Tensor:
    """Rows R, at most `ROWS`, such that `R^T R` is nearly the factor."""
    width = contraction.width(side)
    probes = _normal(width, min(ROWS, width), seed=1, like=contraction.like)
    image = contraction.times_factor(representation, side, probes)
    core = probes.mT @ image
    values, vectors = torch.linalg.eigh((core + core.mT) / 2)
    # Beyond the factor's numerical rank the core is rounding, whose inverse roots are large.
    kept = values > 1e-6 * values[-1]
    return _unit((vectors[:, kept] / values[kept].sqrt()).mT @ image.mT)


def _unit(rows: Tensor) -> Tensor:
    """Of the factor's norm one: what follows has higher powers of sigma."""
    norm = norm_of(rows @ rows.mT)
    return rows / math.sqrt(norm) if norm else rows


@dataclass(frozen=True)
class Pair:
    """Two factors, the second the exact half step from the first, at the optimum.

    Attributes:
        first: on the side opposite to `side`.
        second: on `side`.
        norm: of the first.
        sigma: the norm of the second in units of the first's.
        steps: half steps taken.
        gap: estimate of what sigma still lacks, relatively.
    """

    first: Tensor
    second: Tensor
    side: Side
    norm: float
    sigma: float
    steps: int
    gap: float


def formed(contraction: Sketchable, sketch: Sketch) -> Pair | Start | None:
    """The factors after two half steps from a sketch, or a few more, if that is the optimum.

    Otherwise a start for the solver; None where F is zero.
    """
    side, other, q = sketch.side, opposite(sketch.side), sketch.damping
    before = contraction.apply_rows(sketch.rows, side)
    first = contraction.factor(before, other)
    norm = norm_of(first)
    if not norm:
        return None
    first.div_(norm)
    coefficients = contraction.apply(first, other)
    second = contraction.factor(coefficients, side)
    sigma = norm_of(second)
    if not sigma:
        return None
    # With e_u the share in the sketch of another singular vector, of singular value s relative to
    # the first, the two half steps have changed it by (1 - s^2) e_u, and sigma still lacks half the
    # sum of (1 - s^2) s^2 e_u^2. The cosine between before and after is the ratio of the two norms:
    # <l, A A^T l> is |A^T l|^2.
    gap = max(1 - (norm / sigma) ** 2, 0.0) * q / (1 - q) / 2
    if gap <= sketch.rtol:
        return Pair(first, second, side, 1.0, sigma, 2, gap)
    # Much of that may be what a sketch of few directions lacks, which is gone by now. So by what
    # another half step would change in the first factor, relative to it: E, of which the entries
    # of Z^T E Z off the diagonal have the mean square ||E||^2 for Gaussian Z. Where each sample has
    # one position, probes cost next to nothing.
    count = 4 * PROBES if isinstance(contraction, Primal) else PROBES
    probes = _normal(first.shape[0], count, seed=2, like=first)
    known = Formed(first, before.div_(norm), other)
    change = contraction.changed(known, second, 1 / sigma**2, probes)
    change = change - change.diagonal().diag()
    squared = change.square().sum().item() / (count * (count - 1))
    # E = sum (1 - s^2) e u, with e the shares in the first factor, and sigma lacks half the sum of
    # (1 - s^2) e^2. Twice that, as E is but estimated; and another half step has the sum of
    # s^2 (1 - s^2) e^2 in its place.
    gap = squared / (1 - q)
    more = next((k for k in range(MORE + 1) if gap * q**k <= sketch.rtol), None)
    if more is None and side == "left":
        return Start(coefficients, 2, q)
    if more is None:
        del first, known
        return Start(contraction.apply(second, side) / sigma, 3, q)
    norm = 1.0
    for _ in range(more):
        norm *= sigma
        step = contraction.apply(second, side)
        side, other = other, side
        first, second = second, contraction.factor(step, side)
        sigma = norm_of(second) / norm
    return Pair(first, second, side, norm, sigma, 2 + more, gap * q**more)


def _normal(rows: int, columns: int, *, seed: int, like: Tensor) -> Tensor:
    """The same draws wherever they are used: not in the dtype that is the default there."""
    return _drawn(rows, columns, seed).to(like)


@lru_cache(maxsize=8)
def _drawn(rows: int, columns: int, seed: int) -> Tensor:
    """Kept, as a model's layers are alike, and drawing takes as long as a product with them."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=generator, dtype=torch.float32)
