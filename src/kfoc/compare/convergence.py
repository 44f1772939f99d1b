"""Curves of convergence: by half step of the power iteration, and by number of samples."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import nn

from kfoc import KFOC, Curvature, fit

STEPS = (1, 2, 3, 4, 6, 8, 12)
# Half steps for what the curve converges to.
LIMIT = 200
# Prefixes of the data: at most so many, each half as long as the next.
PREFIXES = 6


class Curve(NamedTuple):
    """Points (x, y), of which y > 0."""

    x: tuple[float, ...]
    y: tuple[float, ...]


def half_steps(
    model: nn.Module, batch: Any, arguments: dict[str, Any]
) -> tuple[dict[str, Curve], int]:
    """How far sigma is from its limit after k half steps, `1 - sigma_k / sigma`, on one batch.

    Sigma is the norm of the block, which the power iteration raises with every half step. The
    curve is the plain iteration's; a fit accelerates it where that pays.

    Returns:
        curves by layer, of those that are iterated, and the number of samples in the batch.
    """

    def after(steps: int) -> Curvature:
        with warnings.catch_warnings():  # it stops after so many steps because it is told to
            warnings.filterwarnings("ignore", ".* did not converge", RuntimeWarning)
            return fit(model, [batch], estimator=KFOC(rtol=0, max_steps=steps), **arguments)

    limit = after(LIMIT)
    sigmas = {name: block.frobenius_norm() for name, block in limit.items() if block.report.steps}
    points: list[tuple[str, float, float]] = []
    for steps in STEPS:
        found = after(steps)
        for name, sigma in sigmas.items():
            floor = 8 * torch.finfo(found[name].dtype).eps  # below, it is all rounding
            left = 1 - found[name].frobenius_norm() / sigma if sigma else 0.0
            points += [(name, steps, left)] * (left > floor)
    return _curves(points), limit.num_samples


def sample_counts(
    fitting: Callable[[Iterable[Any]], Curvature], data: Iterable[Any], whole: Curvature
) -> dict[str, Curve]:
    """How far the estimate of the first n samples is from that of all, relative, by layer."""
    points: list[tuple[str, float, float]] = []
    for count in prefixes(sum(1 for _ in data)):
        part = fitting(First(data, count))
        if part.keys() == whole.keys():
            for name, found in whole.compare(part).items():
                away = found.relative_distance
                points += [(name, part.num_samples, away)] * (1e-6 < away < math.inf)
    return _curves(points)


@dataclass(frozen=True)
class First:
    """The first batches of data, as often as a fit reads them."""

    data: Iterable[Any]
    batches: int

    def __iter__(self) -> Iterator[Any]:
        return islice(iter(self.data), self.batches)


def prefixes(batches: int) -> list[int]:
    """Numbers of batches, short of all of them."""
    halves = {batches // 2**k for k in range(1, PREFIXES + 1)}
    return sorted(halves - {0, batches})


def _curves(points: list[tuple[str, float, float]]) -> dict[str, Curve]:
    found: dict[str, Curve] = {}
    for name, x, y in points:
        before = found.get(name, Curve((), ()))
        found[name] = Curve((*before.x, x), (*before.y, y))
    return found
