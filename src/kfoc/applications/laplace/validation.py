"""How well posteriors predict data that was not trained on."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributions import MultivariateNormal

from kfoc.applications.laplace.evidence import of_samples
from kfoc.applications.laplace.predictive import (
    OutputGaussian,
    Parameters,
    draws,
    output_covariance,
)
from kfoc.curvature.damped import DampedCurvature
from kfoc.likelihoods.base import Likelihood
from kfoc.model.functional import Forward, batches, concerning, count_samples, sliced
from kfoc.model.sample_gradients import chunks, jacobians

# Of the outputs, for likelihoods without a closed form; the same for all candidates.
DRAWS = 100


def validation_losses(
    forward: Forward,
    likelihood: Likelihood,
    posteriors: Sequence[DampedCurvature],
    sigma_noise: float,
    parameters: Parameters,
    data: Iterable[Any],
    chunk_size: int | None,
) -> tuple[list[float], float]:
    """The mean negative log-likelihood per label of each posterior's linearised predictive, and
    that of the network by itself.

    Raises:
        ValueError: no labels, or values that are not finite.
    """
    losses, plain, labels, seen = [0.0] * len(posteriors), 0.0, 0.0, 0
    size = sum(value.numel() for value in parameters.values())

    def of_chunk(mean: Tensor, rows: Parameters, targets: Any) -> None:
        nonlocal plain, labels, seen
        covariances = [output_covariance(posterior, rows) for posterior in posteriors]
        found = []
        for covariance in [*covariances, torch.zeros_like(covariances[0])]:
            outputs = OutputGaussian(mean, covariance)
            values = negative_log_likelihood(likelihood, outputs, targets, sigma_noise, seen)
            found.append(values.sum().item())
        if any(map(math.isnan, found)):
            raise ValueError("the log-likelihood of its targets is not a number")
        losses[:] = [loss + more for loss, more in zip(losses, found[:-1], strict=True)]
        plain, labels = plain + found[-1], labels + count_labels(likelihood, mean, targets)
        seen += len(mean)

    for number, (inputs, targets) in enumerate(batches(data)):
        with concerning(f"batch {number} of data"):
            inputs, targets = forward.moved(inputs), forward.moved(targets)
            count = count_samples(inputs)
            mean = forward.trained(inputs)
            likelihood = likelihood.settled(mean, targets)
            likelihood.check(mean, targets, "empirical")
            forward.check_separate(inputs)
            for part in chunks(count, mean[0].numel() * size, chunk_size):
                rows = jacobians(forward, parameters, sliced(inputs, part))
                of_chunk(mean[part], rows, sliced(targets, part))
    if not labels:
        raise ValueError("data has no labels")
    return [loss / labels for loss in losses], plain / labels


def negative_log_likelihood(
    likelihood: Likelihood,
    outputs: OutputGaussian,
    targets: Any,
    sigma_noise: float,
    first: int,
) -> Tensor:
    """Of every sample's targets, (N,), in float64.

    Jointly for a regression, in closed form; by `moderated` outputs where the likelihood has them;
    otherwise the mean over draws of the outputs.

    Args:
        first: index of the first sample in the data, of which its draws are a function.
    """
    likelihood, targets, weights = likelihood.unweighted(targets)
    if weights is not None:
        found = negative_log_likelihood(likelihood, outputs, targets, sigma_noise, first)
        return found * weights.to(found)
    wide = OutputGaussian(*(tensor.double() for tensor in outputs))
    if likelihood.defines("noise_variance"):
        mean, covariance = wide.with_noise(
            sigma_noise * likelihood.noise_variance(wide.mean).sqrt()
        )
        normal = MultivariateNormal(mean.flatten(1), covariance)
        return -normal.log_prob(targets.to(mean).flatten(1))
    if likelihood.defines("moderated"):
        about = likelihood.moderated(wide.mean, wide.variance)
        return -of_samples(likelihood, "log_likelihood", about, targets)
    drawn = [
        of_samples(likelihood, "log_likelihood", each, targets)
        for each in draws(wide, DRAWS, 0, first)
    ]
    return math.log(DRAWS) - torch.stack(drawn).logsumexp(0)


def count_labels(likelihood: Likelihood, outputs: Tensor, targets: Any) -> float:
    """What the losses of samples are divided by: labels, or samples of a regression."""
    if likelihood.defines("noise_variance"):
        _, _, weights = likelihood.unweighted(targets)
        return len(outputs) if weights is None else weights.sum().item()
    return of_samples(likelihood, "num_labels", outputs, targets).sum().item()
