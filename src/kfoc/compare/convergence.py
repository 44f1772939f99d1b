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

from kfoc import KFOC, Block, Curvature, fit

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
    with warnings.catch_warnings():  # which stop after so many steps because they are told to
        warnings.filterwarnings("ignore", ".* did not converge", RuntimeWarning)
        return _half_steps(model, batch, arguments)


def _half_steps(
    model: nn.Module, batch: Any, arguments: dict[str, Any]
) -> tuple[dict[str, Curve], int]:
    limit = fit(model, [batch], estimator=KFOC(rtol=0, max_steps=LIMIT), **arguments)
    layers = [name for name, block in limit.items() if block.report.steps]
    sigmas = {name: limit[name].frobenius_norm() for name in layers}
    points: dict[str, list[tuple[float, float]]] = {name: [] for name in layers}
    for steps in STEPS:
        found = fit(model, [batch], estimator=KFOC(rtol=0, max_steps=steps), **arguments)
        for name in layers:
            floor = 8 * torch.finfo(found[name].dtype).eps  # below, it is all rounding
            left = 1 - found[name].frobenius_norm() / sigmas[name] if sigmas[name] else 0.0
            if left > floor:
                points[name].append((steps, left))
    return _curves(points), limit.num_samples


def sample_counts(
    fitting: Callable[[Iterable[Any]], Curvature], data: Iterable[Any], whole: Curvature
) -> dict[str, Curve]:
    """How far the estimate of the first n samples is from that of all, relative, by layer."""
    points: dict[str, list[tuple[float, float]]] = {name: [] for name in whole}
    for count in prefixes(sum(1 for _ in data)):
        part = fitting(First(data, count))
        for name in [name for name in whole if name in part]:
            away = distance(part[name], whole[name])
            if away > 1e-6:
                points[name].append((part.num_samples, away))
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


def distance(first: Block, second: Block) -> float:
    """`||first - second|| / ||second||`, in float64, without forming either."""
    a, b = (block.to(dtype=torch.float64) for block in (first, second))
    norm = b.inner(b)
    if not norm:
        return 0.0
    return math.sqrt(max(a.inner(a) - 2 * a.inner(b) + norm, 0.0) / norm)


def _curves(points: dict[str, list[tuple[float, float]]]) -> dict[str, Curve]:
    return {
        name: Curve(tuple(x for x, _ in found), tuple(y for _, y in found))
        for name, found in points.items()
        if found
    }
