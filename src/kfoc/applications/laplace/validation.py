"""How well posteriors predict data that was not trained on."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributions import MultivariateNormal

from kfoc.applications.laplace.evidence import class_dimension
from kfoc.applications.laplace.predictive import (
    OutputGaussian,
    Parameters,
    output_covariance,
    probit,
)
from kfoc.curvature.damped import DampedCurvature
from kfoc.likelihoods.base import Likelihood
from kfoc.likelihoods.categorical import Categorical
from kfoc.likelihoods.gaussian import Gaussian
from kfoc.model.functional import Forward, batches, concerning, count_samples, sliced
from kfoc.model.sample_gradients import chunks, jacobians


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
    losses, plain, labels = [0.0] * len(posteriors), 0.0, 0
    size = sum(value.numel() for value in parameters.values())

    def of_chunk(mean: Tensor, rows: Parameters, targets: Tensor) -> None:
        nonlocal plain, labels
        covariances = [output_covariance(posterior, rows) for posterior in posteriors]
        found = []
        for covariance in [*covariances, torch.zeros_like(covariances[0])]:
            outputs = OutputGaussian(mean, covariance)
            values = negative_log_likelihood(likelihood, outputs, targets, sigma_noise)
            found.append(values.sum().item())
        if any(map(math.isnan, found)):
            raise ValueError("the log-likelihood of its targets is not a number")
        losses[:] = [loss + more for loss, more in zip(losses, found[:-1], strict=True)]
        plain, labels = plain + found[-1], labels + values.numel()

    for number, (inputs, targets) in enumerate(batches(data)):
        with concerning(f"batch {number} of data"):
            inputs, targets = forward.moved(inputs), forward.moved(targets)
            count = count_samples(inputs)
            mean = forward.trained(inputs)
            likelihood = likelihood.settled(mean, targets)
            likelihood.check(mean, targets, "empirical")
            forward.check_separate(inputs)
            for part in chunks(count, mean[0].numel() * size, chunk_size):
                of_chunk(
                    mean[part], jacobians(forward, parameters, sliced(inputs, part)), targets[part]
                )
    if not labels:
        raise ValueError("data has no labels")
    return [loss / labels for loss in losses], plain / labels


def negative_log_likelihood(
    likelihood: Likelihood, outputs: OutputGaussian, targets: Tensor, sigma_noise: float
) -> Tensor:
    """Of every label that counts, or of every sample's targets in a regression, in float64."""
    wide = OutputGaussian(*(tensor.double() for tensor in outputs))
    if isinstance(likelihood, Gaussian):
        mean, covariance = wide.with_noise(sigma_noise)
        normal = MultivariateNormal(mean.flatten(1), covariance)
        return -normal.log_prob(targets.double().flatten(1))
    found = probit(likelihood, wide)
    if not isinstance(likelihood, Categorical):
        return torch.nn.functional.binary_cross_entropy(found, targets.double(), reduction="none")
    dim = class_dimension(likelihood, found, targets)
    counts = targets != likelihood.ignore_index
    chosen = torch.where(counts, targets, 0).long().unsqueeze(dim)
    return -found.gather(dim, chosen).squeeze(dim)[counts].log()
