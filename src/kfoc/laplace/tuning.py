"""Maxima of functions of one positive number, as precisions and noise levels need them."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable

Function = Callable[[float], float]
Bounds = tuple[float, float]

# Starting points per factor of ten: a maximum that falls between two of them is not narrow.
PER_DECADE = 2
# Of the logarithm of the argument. The functions are flat there: their error is its square.
TOLERANCE = 1e-6
GOLDEN = (math.sqrt(5) - 1) / 2


def maximum(function: Function, bounds: Bounds, what: str) -> tuple[float, float]:
    """The argument and the value of the largest maximum on a logarithmic scale.

    Arguments for which the function raises a ValueError, as the log-determinant of an indefinite
    matrix does, are left out of the search.

    Args:
        what: the argument's name in the warning, given where the maximum is at a bound.

    Raises:
        ValueError: bad bounds, or an error for every argument.
    """
    low, high = bounds
    if not 0 < low < high < math.inf:
        raise ValueError(f"bounds must be two positive numbers in order, found {bounds}")
    errors: list[ValueError] = []

    def value(log: float) -> float:
        try:
            return function(math.exp(log))
        except ValueError as error:
            errors.append(error)
            return -math.inf

    start, stop = math.log(low), math.log(high)
    count = max(2, math.ceil((stop - start) / math.log(10) * PER_DECADE))
    logs = [start + (stop - start) * k / count for k in range(count + 1)]
    values = [value(log) for log in logs]
    best = max(range(count + 1), key=values.__getitem__)
    if values[best] == -math.inf:
        raise errors[-1]
    log, found = _golden(value, logs[max(best - 1, 0)], logs[min(best + 1, count)])
    if min(log - start, stop - log) < 10 * TOLERANCE:
        warnings.warn(
            f"the best {what} is at the bound {math.exp(log):.3g} of the search: give other bounds",
            RuntimeWarning,
            stacklevel=2,
        )
    return math.exp(log), found


def _golden(value: Function, low: float, high: float) -> tuple[float, float]:
    """Golden section search for the maximum between two points."""
    inner, outer = high - GOLDEN * (high - low), low + GOLDEN * (high - low)
    at_inner, at_outer = value(inner), value(outer)
    while high - low > TOLERANCE:
        # A tie is two inadmissible arguments, which lie below the admissible ones.
        if at_inner > at_outer:
            high, outer, at_outer = outer, inner, at_inner
            inner = high - GOLDEN * (high - low)
            at_inner = value(inner)
        else:
            low, inner, at_inner = inner, outer, at_outer
            outer = low + GOLDEN * (high - low)
            at_outer = value(outer)
    return (inner, at_inner) if at_inner > at_outer else (outer, at_outer)
