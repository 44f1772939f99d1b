"""How well posteriors predict data that was not trained on."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributions import MultivariateNormal

from kfoc.damped import DampedCurvature
from kfoc.forward import Forward, batches, count_samples, sliced
from kfoc.jacobians import chunks, jacobians
from kfoc.laplace.evidence import class_dimension
from kfoc.laplace.predictive import OutputGaussian, Parameters, output_covariance, probit
from kfoc.likelihoods import Categorical, Gaussian, Likelihood


def validation_losses(
    forward: Forward,
    likelihood: Likelihood,
    posteriors: Sequence[DampedCurvature],
    sigma_noise: float,
    parameters: Parameters,
    data: Iterable[Any],
    chunk_size: int | None,
) -> list[float]:
    """The mean negative log-likelihood per label of each posterior's linearised predictive."""
    losses, labels = [0.0] * len(posteriors), 0
    size = sum(value.numel() for value in parameters.values())
    for inputs, targets in batches(data):
        inputs, targets = forward.moved(inputs), forward.moved(targets)
        with torch.no_grad():
            mean = forward.outputs(inputs, {})
        likelihood.check(mean, targets, "empirical")
        forward.check_separate(inputs)
        for part in chunks(count_samples(inputs), mean[0].numel() * size, chunk_size):
            rows = jacobians(forward, parameters, sliced(inputs, part))
            for k, posterior in enumerate(posteriors):
                outputs = OutputGaussian(mean[part], output_covariance(posterior, rows))
                values = negative_log_likelihood(likelihood, outputs, targets[part], sigma_noise)
                losses[k] += values.sum().item()
            labels += values.numel()
    if not labels:
        raise ValueError("data has no labels")
    return [loss / labels for loss in losses]


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
