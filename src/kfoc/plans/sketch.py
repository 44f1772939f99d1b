"""A start near the optimum, from a small problem that is nearly the same one.

Per-sample gradients are of low numerical rank, and a factor sums their squares, so that what is
small in them hardly shows in it. So the samples are reduced: for several positions, every gradient
to a few directions of its own (randomised singular value decomposition, Halko, Martinsson & Tropp
2011), for one position, inputs and gradients to a few directions in common. The reduced problem is
solved, and of its factor on the layer's larger side a low-rank sketch is made (Nystrom). Two half
steps over all samples, which form the two factors once as K-FAC does, then reach the optimum as a
rule: the first is cheap, as its factor is of low rank, and the second is on the smaller side.
Whether they did is checked by what a third one would change, along a few random directions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from kfoc.linalg.products import orthonormal
from kfoc.linalg.scaling import norm_of
from kfoc.nearest.accelerated import Start, fit_contraction, leading_pair
from kfoc.nearest.contraction import Side, opposite
from kfoc.nearest.power import KroneckerFit, relative_error
from kfoc.plans.explicit import Gradients
from kfoc.plans.positions import PositionGram, Positions
from kfoc.plans.single import Primal
from kfoc.plans.sketch_cost import PROBES, ROWS
from kfoc.samples.inputs import Rows
from kfoc.samples.linear import Samples

# Gradients whose errors cancel one another.
MANY = 64

# Half steps that the reduced problem may take.
MAX_STEPS = 40

# Half steps that may follow the two: beyond, the accelerated solver is faster.
MORE = 2

# Of what the sketch lacks, and how slowly half steps make up for it: beyond, two are not enough.
HOPELESS = 0.25

# Of what the sketch lacks: beyond, a cheap step is to make up for it.
LOSSY = 0.1

# Singular values as close as this might change places in the reduced problem.
CLOSEST = 0.9


Sketchable = Primal | Positions | Gradients


@dataclass(frozen=True)
class Sketch:
    """A factor near the optimum's, `rows^T rows` on `side`.

    Attributes:
        rows: (r, n).
        damping: estimate of the squared ratio of the second singular value to the first.
        lost: estimate of the share of the gradients' squares that the reduced problem lacks.
    """

    rows: Tensor
    side: Side
    damping: float
    lost: float


def fit_from_sketch(
    contraction: Sketchable,
    shape: tuple[int, int],
    rank: int,
    *,
    rtol: float,
    max_steps: int,
    certify: bool,
    scale: float,
) -> KroneckerFit:
    """As `fit_contraction`, from a sketch.

    Args:
        shape: (o, i).
        rank: directions that samples are reduced to.
    """
    sketch = sketched(contraction, shape, rank, rtol)
    found = formed(contraction, sketch, rtol) if sketch else None
    if not isinstance(found, Formed):
        return fit_contraction(
            contraction,
            rtol=rtol,
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
    return KroneckerFit(left, right, sigma, error, found.steps, True, contraction.plan)


def sketched(
    contraction: Sketchable, shape: tuple[int, int], rank: int, rtol: float
) -> Sketch | None:
    """A sketch of the factor on the larger side; None where none can be relied on."""
    side: Side = "left" if shape[0] > shape[1] else "right"
    lost = 0.0
    bases: dict[Side, Tensor | None] = {}
    inner: Primal | PositionGram
    if isinstance(contraction, Primal):
        projected = contraction.projected(rank)
        if projected is None:
            return None
        reduced, bases = projected
        inner = Primal(reduced)
    else:
        reduced, lost = truncated(contraction, shape[1], rank)
        inner = PositionGram(reduced)
    precision = 4 * torch.finfo(reduced.grads.dtype).eps
    # Tighter than what is asked for, as the reduction has an error too; but not under the
    # precision, where the solver would go on until the factors have settled.
    found = leading_pair(inner, max(rtol / 4, 1.1 * precision), MAX_STEPS)
    if not found.converged or not found.sigma or found.damping > CLOSEST:
        return None
    representation = found.left if side == "left" else found.right
    if isinstance(inner, Primal):
        rows = _root(inner.factor(representation, side), bases[side])
    else:
        rows = _nystrom(inner, representation, side)
    return Sketch(rows, side, max(found.damping, 0.1), lost)


def truncated(contraction: Positions | Gradients, width: int, rank: int) -> tuple[Samples, float]:
    """The samples with every per-sample gradient near `P Q^T` of that rank: as `rank` positions.

    Returns:
        The samples, and an estimate of the share of the gradients' squares that they lack.
    """
    directions = _normal(width, rank, seed=0, like=contraction.like)
    found = contraction.carried(directions, "right")
    whole = found.square().sum().item() / rank
    # Steps of subspace iteration: gradients' singular values fall slowly, and a second step is
    # worth its time where there are few gradients.
    for _ in range(2 if len(found) < MANY else 1):
        again = contraction.carried(orthonormal(found.mT).mT, "left")
        found = contraction.carried(again, "right")
    left = orthonormal(found.mT)  # (M, k, o)
    right = contraction.carried(left.mT, "left").mT
    lost = 1 - right.square().sum().item() / whole if whole else 0.0
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


def _normed(factor: Tensor) -> Tensor | None:
    """In place, of unit norm; None where it is zero."""
    norm = norm_of(factor)
    return factor.div_(norm) if norm else None


@dataclass(frozen=True)
class Formed:
    """Two factors, the second the exact half step from the first, at the optimum.

    Attributes:
        first: on the side opposite to `side`.
        second: on `side`.
        norm: of the first.
        sigma: the norm of the second in units of the first's.
        steps: half steps taken.
    """

    first: Tensor
    second: Tensor
    side: Side
    norm: float
    sigma: float
    steps: int


def formed(contraction: Sketchable, sketch: Sketch, rtol: float) -> Formed | Start | None:
    """The factors after two half steps from a sketch, or a few more, if that is the optimum.

    Otherwise a start for the solver; None where F is zero.
    """
    side, other, q = sketch.side, opposite(sketch.side), sketch.damping
    coefficients = contraction.apply_rows(sketch.rows, side)
    # Factors would be formed in vain: the half step that is taken by now starts the solver.
    if sketch.lost * q / (1 - q) > HOPELESS:
        return _start(contraction, coefficients, other, 1, q)
    first = _normed(contraction.factor(coefficients, other))
    if first is not None and sketch.lost > LOSSY and isinstance(contraction, Positions):
        # A full step with the factor on the larger side of low rank: it is not formed.
        rows = _nystrom(contraction, contraction.apply(first, other), side)
        first = _normed(contraction.factor(contraction.apply_rows(rows, side), other))
    if first is None:
        return None
    coefficients = contraction.apply(first, other)
    second = contraction.factor(coefficients, side)
    sigma = norm_of(second)
    if not sigma:
        return None
    # The reduced problem cannot tell what it lacks, so the check is over all samples:
    # what another half step would change in the first factor, relative to it: E, of which the
    # entries of Z^T E Z off the diagonal have the mean square ||E||^2 for Gaussian Z.
    # Where each sample has one position, probes cost next to nothing.
    count = 4 * PROBES if isinstance(contraction, Primal) else PROBES
    probes = _normal(first.shape[0], count, seed=2, like=first)
    image, step = contraction.quadratic(second, side, probes)
    change = image / sigma**2 - probes.mT @ first @ probes
    change = change - change.diagonal().diag()
    squared = change.square().sum().item() / (count * (count - 1))
    # With E = sum (1 - s^2) e u over the other singular vectors u, of singular values s relative to
    # the first, sigma lacks half the sum of (1 - s^2) e^2. Twice that, as E is but estimated; and
    # another half step has the sum of s^2 (1 - s^2) e^2 in its place.
    remaining = squared / (1 - q)
    more = next((k for k in range(MORE + 1) if remaining * q**k <= rtol), None)
    if more is None and side == "left":
        return Start(coefficients, 2, q)
    if more is None:
        del first
        step = contraction.apply(second, side) if step is None else step
        return Start(step / sigma, 3, q)
    norm = 1.0
    for _ in range(more):
        norm *= sigma
        step = contraction.apply(second, side) if step is None else step
        side, other = other, side
        first, second, step = second, contraction.factor(step, side), None
        sigma = norm_of(second) / norm
    return Formed(first, second, side, norm, sigma, 2 + more)


def _start(
    contraction: Sketchable, coefficients: Tensor, side: Side, steps: int, damping: float
) -> Start | None:
    """From coefficients of any scale."""
    if side == "right":
        coefficients, steps = contraction.advance(coefficients, "right"), steps + 1
    norm = math.sqrt(max(contraction.inner(coefficients, coefficients, "left").item(), 0.0))
    return Start(coefficients / norm, steps, damping) if norm else None


def _normal(*shape: int, seed: int, like: Tensor) -> Tensor:
    """The same draws wherever they are used: not in the dtype that is the default there."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(like)
