"""How well posteriors predict data that was not trained on."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributions import MultivariateNormal

from kfoc.applications.laplace.evidence import of_samples
from kfoc.applications.laplace.linearised import Linearised
from kfoc.applications.laplace.predictive import OutputGaussian, draws
from kfoc.curvature.damped import DampedCurvature
from kfoc.likelihoods.base import Likelihood
from kfoc.model.functional import concerning, sliced

# Of the outputs, for likelihoods without a closed form; the same for all candidates.
DRAWS = 100


@dataclass(frozen=True)
class Validation:
    """How well the network by itself, and posteriors around it, predict held-out data.

    Attributes:
        losses: (prior precision, temperature) -> the mean negative log-likelihood of a label (of a
            sample, in a regression) under the linearised predictive.
        plain: that of the network by itself, the posterior without any width.
    """

    losses: dict[tuple[float, float], float]
    plain: float

    @property
    def best(self) -> tuple[float, float]:
        """The prior precision and the temperature of the smallest loss."""
        return min(self.losses, key=self.losses.__getitem__)

    def __str__(self) -> str:
        rows = [("prior precision", "temperature", "negative log-likelihood")]
        rows += [("network by itself", "", f"{self.plain:.4f}")]
        for (prior, temperature), loss in self.losses.items():
            mark = "  best" if (prior, temperature) == self.best else ""
            rows.append((f"{prior:.4g}", f"{temperature:.4g}", f"{loss:.4f}{mark}"))
        return "\n".join(f"{a:<19}{b:<13}{c}" for a, b, c in rows)


def validation_losses(
    linearised: Linearised,
    likelihood: Likelihood,
    posteriors: Sequence[DampedCurvature],
    sigma_noise: float,
    data: Iterable[Any],
) -> tuple[list[float], float]:
    """The mean negative log-likelihood of each posterior's predictive, and of the network alone.

    Raises:
        ValueError: no labels, or values that are not finite.
    """
    forward = linearised.forward
    losses, plain, labels, seen = [0.0] * len(posteriors), 0.0, 0.0, 0
    for number, (inputs, targets) in enumerate(forward.batches(data)):
        with concerning(f"batch {number} of data"):
            inputs, targets = forward.moved(inputs), forward.moved(targets)
            outputs = forward.trained(inputs)
            likelihood = likelihood.settled(outputs, targets)
            likelihood.check(outputs, targets, "empirical")
            marginal = takes_variances(likelihood)
            moments = linearised.variances if marginal else linearised.covariances
            for part, spreads in moments(inputs, outputs, posteriors):
                mean, some = outputs[part], sliced(targets, part)
                found = [
                    negative_log_likelihood(likelihood, mean, spread, some, sigma_noise, seen)
                    for spread in (*spreads, torch.zeros_like(spreads[0]))
                ]
                if any(value.isnan() for value in found):
                    raise ValueError("the log-likelihood of its targets is not a number")
                *values, alone = (value.item() for value in found)
                losses = [loss + value for loss, value in zip(losses, values, strict=True)]
                plain, seen = plain + alone, seen + len(mean)
                labels += count_labels(likelihood, mean, some)
    if not labels:
        raise ValueError("data has no labels")
    return [loss / labels for loss in losses], plain / labels


def takes_variances(likelihood: Likelihood) -> bool:
    """Whether the variances of the outputs are enough for the predictive."""
    return likelihood.defines("moderated") and not likelihood.defines("noise_variance")


def negative_log_likelihood(
    likelihood: Likelihood,
    mean: Tensor,
    spread: Tensor,
    targets: Any,
    sigma_noise: float,
    first: int,
) -> Tensor:
    """The sum over samples, a scalar in float64.

    Jointly for a regression's targets, in closed form; by `moderated` outputs where the likelihood
    has them; otherwise the mean over draws of the outputs.

    Args:
        spread: of the outputs: their variances (N, ...) where `takes_variances`, or covariances.
        first: index of the first sample in the data, of which its draws are a function.
    """
    likelihood, targets, weights = likelihood.unweighted(targets)
    mean, spread = mean.double(), spread.double()
    if takes_variances(likelihood):
        about = likelihood.moderated(mean, spread)
        found = of_samples(likelihood, "log_likelihood", about, targets)
    elif likelihood.defines("noise_variance"):
        noise = sigma_noise * likelihood.noise_variance(mean).sqrt()
        _, covariance = OutputGaussian(mean, spread).with_noise(noise)
        normal = MultivariateNormal(mean.flatten(1), covariance)
        found = normal.log_prob(targets.to(mean).flatten(1))
    else:
        drawn = [
            of_samples(likelihood, "log_likelihood", outputs, targets)
            for outputs in draws(OutputGaussian(mean, spread), DRAWS, 0, first)
        ]
        found = torch.stack(drawn).logsumexp(0) - math.log(DRAWS)
    return -(found if weights is None else found * weights.to(found)).sum()


def count_labels(likelihood: Likelihood, outputs: Tensor, targets: Any) -> float:
    """What the losses of samples are divided by: labels, or samples of a regression."""
    if likelihood.defines("noise_variance"):
        _, _, weights = likelihood.unweighted(targets)
        return len(outputs) if weights is None else weights.sum().item()
    return of_samples(likelihood, "num_labels", outputs, targets).sum().item()
