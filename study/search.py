"""Settings of a method, searched for on a lattice until the best of them is not at an edge.

Every method tries as many settings, and more only while its best is at an edge. The next is a
neighbour of the best so far, by one score and by the other in turn; of the second best, and so on,
once the best has all its neighbours.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

Point = tuple[int, ...]
Scores = tuple[float, ...]


@dataclass(frozen=True)
class Axis:
    """A number that is searched for: `start * step ** k` for whole k."""

    name: str
    start: float
    step: float

    def at(self, k: int) -> float:
        return float(f"{self.start * self.step**k:.3g}")


def search(
    measure: Callable[[Point], Scores], dimensions: int, count: int, most: int
) -> dict[Point, Scores]:
    """Points and their scores, of which less is better, in the order of trying them.

    Args:
        count: of points; more while the best by a score lacks neighbours.
        most: at most so many.
    """
    tried: dict[Point, Scores] = {}
    point: Point = (0,) * dimensions
    while len(tried) < most:
        tried[point] = measure(point)
        if len(tried) >= count and all(inside(each, tried) for each in best(tried)):
            break
        point = _next(tried)
    return tried


def best(tried: dict[Point, Scores]) -> list[Point]:
    """The best point by each score."""
    scores = range(len(next(iter(tried.values()))))
    return [min(tried, key=lambda point, k=k: tried[point][k]) for k in scores]


def neighbours(point: Point) -> Iterator[Point]:
    for axis in range(len(point)):
        for step in (-1, 1):
            yield (*point[:axis], point[axis] + step, *point[axis + 1 :])


def inside(point: Point, tried: dict[Point, Scores]) -> bool:
    """Whether a point's neighbours have all been tried."""
    return all(each in tried for each in neighbours(point))


def _next(tried: dict[Point, Scores]) -> Point:
    count = len(next(iter(tried.values())))
    turns = [(len(tried) + k) % count for k in range(count)]
    orders = [sorted(tried, key=lambda point, k=turn: tried[point][k]) for turn in turns]
    ranked = (order[rank] for rank in range(len(tried)) for order in orders)
    return next(each for point in ranked for each in neighbours(point) if each not in tried)
