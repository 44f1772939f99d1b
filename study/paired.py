"""Two methods on the same networks and seeds: mean difference, its standard error, and who won."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from typing import Any

from kfoc.reproduce.results import Row

ORDER = ("MLP", "CNN", "ResNet", "tokens", "encoder", "GPT")
PAIRS = (("K-FOC", "K-FAC"), ("EK-FOC", "EKFAC"))


def in_order(names: Sequence[str]) -> list[str]:
    return sorted(set(names), key=ORDER.index)


def differences(
    rows: list[Row], key: str, pair: tuple[str, str], as_: Callable[[float], float] = float
) -> dict[tuple[Any, ...], float]:
    """By network and seed: the first method's value less the second's."""
    found: list[dict[tuple[Any, ...], float]] = []
    for method in pair:
        mine = [row for row in rows if row["method"] == method and row[key] is not None]
        found.append({(row["network"], row["seed"]): as_(row[key]) for row in mine})
    return {case: found[0][case] - found[1][case] for case in found[0] if case in found[1]}


def error_of_mean(found: Sequence[float]) -> float:
    return statistics.stdev(found) / math.sqrt(len(found)) if len(found) > 1 else math.nan


def mean_and_error(found: Sequence[float], digits: int = 3) -> str:
    """ "+0.012 ± 0.003", with the standard error of the mean."""
    if not found:
        return "-"
    error = f" ± {error_of_mean(found):.{digits}f}" if len(found) > 1 else ""
    return f"{statistics.fmean(found):+.{digits}f}{error}"


def with_error(mean: float, error: float) -> str:
    """Both with as many decimals: two digits of the error, or one where it is below 0.01.

    Three decimals where there is no error, or none to speak of.
    """
    decimals = 3
    if error > 0:
        first = math.floor(math.log10(error))
        decimals = max(0, -first if first < -2 else 1 - first)
    shown = "" if math.isnan(error) else f" ± {error:.{decimals}f}"
    return f"{round(mean, decimals) + 0.0:+.{decimals}f}{shown}"  # no -0


def ratio(logs: Sequence[float]) -> str:
    """Of natural logarithms' differences: their geometric mean, with the range of one error."""
    if not logs:
        return "-"
    middle, error = statistics.fmean(logs), error_of_mean(logs)
    if math.isnan(error):
        return f"{math.exp(middle):.2f}"
    ends = (math.exp(middle - error), math.exp(middle + error))
    return f"{math.exp(middle):.2f} ({ends[0]:.2f} to {ends[1]:.2f})"


def wins(found: Sequence[float], sign: int = -1) -> str:
    """How often the first was better; less is better where the sign is -1."""
    return f"{sum(sign * value > 0 for value in found)} of {len(found)}"
