"""Prior precision and noise where the marginal likelihood has its maximum, without gradients."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping

from torch import Tensor

from kfoc.applications.laplace.evidence import DataFit, layer_term
from kfoc.applications.laplace.prior import positive
from kfoc.applications.laplace.validation import Validation
from kfoc.curvature.damped import DampedCurvature

Function = Callable[[float], float]
Bounds = tuple[float, float]

# Starting points per factor of ten: a maximum that falls between two of them is not narrow.
PER_DECADE = 2
# Of the logarithm of the argument. The functions are flat there: their error is its square.
TOLERANCE = 1e-6
GOLDEN = (math.sqrt(5) - 1) / 2


def best_prior(
    posterior: DampedCurvature,
    squared_norms: Mapping[str, float],
    scale: Tensor,
    per_layer: bool,
    bounds: Bounds,
) -> tuple[float | dict[str, float], float]:
    """The best prior precision, for all layers or for each, and the layers' share of the evidence.

    Given the scale, the evidence is a sum over layers of functions of their own precision, so the
    maximum of each is the maximum of all.

    Args:
        posterior, squared_norms, scale: as for `evidence.log_marginal_likelihood`.
    """
    blocks = posterior.blocks

    def term(layer: str) -> Function:
        def of_precision(precision: float) -> float:
            value = positive("prior_precision", precision)
            return layer_term(blocks[layer], squared_norms[layer], value, scale).item()

        return of_precision

    if not per_layer:
        return maximum(lambda p: sum(term(layer)(p) for layer in blocks), bounds)
    best, total = {}, 0.0
    for layer in blocks:
        best[layer], value = maximum(term(layer), bounds)
        total += value
    return best, total


def best_noise(fit: DataFit, temperature: float, share: Callable[[Tensor], float]) -> float:
    """The best noise level of a regression.

    Args:
        share: the layers' share of the evidence at a noise level, at its best prior precision.

    Raises:
        ValueError: a fit without any error.
    """
    rms = math.sqrt(2 * fit.misfit / fit.num_labels)
    if not rms:
        raise ValueError("the model fits its data exactly: the noise has no best level")

    def evidence(sigma: float) -> float:
        value = positive("sigma_noise", sigma)
        return fit.log_likelihood(value).item() / temperature + share(value)

    bounds = rms / 30, rms * 30
    sigma, _ = maximum(evidence, bounds)
    warn_at_bound(sigma, bounds, "sigma_noise")
    return sigma


def maximum(function: Function, bounds: Bounds) -> tuple[float, float]:
    """The argument and the value of the largest maximum on a logarithmic scale.

    Arguments for which the function raises a ValueError, as the log-determinant of an indefinite
    matrix does, are left out of the search.

    Raises:
        ValueError: bad bounds, or an error for every argument.
    """
    low, high = bounds
    if not 0 < low < high < math.inf:
        raise ValueError(f"bounds must be two positive numbers in order, found {bounds}")
    errors: list[ValueError] = []

    def value(log: float) -> float:
        try:
            found = function(math.exp(log))
            if math.isnan(found):
                raise ValueError(f"the function to maximise is not a number at {math.exp(log):.3g}")
            return found
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
    return math.exp(log), found


def warn_at_bound(value: float, bounds: Bounds, what: str) -> None:
    """Tell the caller of `Laplace.tuned` where the search ended at a bound."""
    if min(math.log(value / bounds[0]), math.log(bounds[1] / value)) < 10 * TOLERANCE:
        warnings.warn(
            f"the best {what} is at the bound {value:.3g} of the search: its maximum is beyond, or "
            "nowhere",
            RuntimeWarning,
            stacklevel=4,
        )


def warn_of_candidate(found: Validation) -> None:
    """Tell the caller of `Laplace.tuned_by_validation` where the best is none to trust."""
    loss, plain = found.losses[found.best], found.plain
    for number, what in enumerate(("prior precision", "temperature")):
        tried = {pair[number] for pair in found.losses}
        chosen = found.best[number]
        if len(tried) > 1 and chosen in (min(tried), max(tried)):
            warnings.warn(
                f"the best {what} is the {'largest' if chosen == max(tried) else 'smallest'} "
                f"candidate, {chosen:.3g}: a better one may lie beyond; give more candidates",
                RuntimeWarning,
                stacklevel=4,
            )
    if loss > plain and not math.isclose(loss, plain, rel_tol=1e-6):
        warnings.warn(
            f"with the best prior precision, {found.best[0]:.3g}, the posterior predicts the data "
            f"worse than the network by itself (negative log-likelihoods {loss:.4g} and "
            f"{plain:.4g}): "
            "give larger candidates, or do without the posterior",
            RuntimeWarning,
            stacklevel=4,
        )


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
