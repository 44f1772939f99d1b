"""What a Gaussian over parameters says about outputs: linearised, or by drawing networks."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kfoc.applications.laplace.evidence import class_dimension
from kfoc.curvature.damped import DampedCurvature
from kfoc.likelihoods.base import Likelihood
from kfoc.likelihoods.bernoulli import Bernoulli
from kfoc.likelihoods.categorical import Categorical
from kfoc.model.functional import Forward
from kfoc.model.sample_gradients import jacobians

Parameters = Mapping[str, Tensor]


class OutputGaussian(NamedTuple):
    """A Gaussian over the outputs of each sample.

    Attributes:
        mean: (N, ...), of the outputs' shape.
        covariance: (N, K, K), over the K outputs of a sample in the order of `mean[n].flatten()`.
    """

    mean: Tensor
    covariance: Tensor

    @property
    def variance(self) -> Tensor:
        """The variance of every output, of the shape of `mean`."""
        return self.covariance.diagonal(dim1=1, dim2=2).reshape(self.mean.shape)

    def with_noise(self, sigma: float) -> OutputGaussian:
        """With independent noise of standard deviation `sigma` on every output."""
        noise = torch.full_like(self.covariance[0, 0], sigma**2).diag()
        return OutputGaussian(self.mean, self.covariance + noise)


def linearised(
    forward: Forward, posterior: DampedCurvature, parameters: Parameters, inputs: Any
) -> OutputGaussian:
    """Mean `f(x)` and covariance `J B^-1 J^T` of the model linearised at its parameters."""
    mean = forward.trained(inputs)
    rows = jacobians(forward, parameters, inputs)
    return OutputGaussian(mean, output_covariance(posterior, rows))


def output_covariance(posterior: DampedCurvature, rows: Parameters) -> Tensor:
    """`J B^-1 J^T`, (N, K, K), from Jacobians name -> (N, K, *shape)."""
    solved = posterior.solve(rows)
    parts = [rows[name].flatten(2) @ solved[name].flatten(2).mT for name in rows]
    covariance = torch.stack(parts).sum(0)
    return (covariance + covariance.mT) / 2


def probit(likelihood: Likelihood, outputs: OutputGaussian) -> Tensor:
    """Probabilities (N, ...) by the probit approximation (MacKay 1992; Spiegelhalter 1990).

    A sigmoid is exact up to its probit stand-in; a softmax takes each logit's variance alone.
    """
    scaled = outputs.mean / (1 + math.pi / 8 * outputs.variance).sqrt()
    return probabilities(likelihood, scaled)


def monte_carlo(likelihood: Likelihood, outputs: OutputGaussian, num: int, seed: int) -> Tensor:
    """Mean probabilities (N, ...) over `num` draws of the outputs."""
    generator = torch.Generator().manual_seed(seed)
    values, vectors = torch.linalg.eigh(outputs.covariance)
    root = vectors * values.clamp_min(0).sqrt()[:, None]  # a root, where rounding has no Cholesky
    count, size = root.shape[:2]
    total = torch.zeros_like(outputs.mean)
    for _ in range(num):
        noise = torch.randn(count, size, 1, generator=generator, dtype=root.dtype).to(root)
        drawn = outputs.mean + (root @ noise).reshape(outputs.mean.shape)
        total += probabilities(likelihood, drawn)
    return total / num


def probabilities(likelihood: Likelihood, logits: Tensor) -> Tensor:
    """Of every class, or of a label of 1, in the shape of the logits."""
    if isinstance(likelihood, Categorical):
        return logits.softmax(class_dimension(likelihood, logits))
    if isinstance(likelihood, Bernoulli):
        return logits.sigmoid()
    raise ValueError(
        f"probabilities are for a categorical or bernoulli likelihood, found {likelihood!r}: "
        "use predictive() for regression, sampled_outputs() for a likelihood of your own"
    )


def networks(
    posterior: DampedCurvature,
    parameters: Parameters,
    num: int,
    seed: int,
    generator: torch.Generator | None = None,
) -> Iterator[dict[str, Tensor]]:
    """`num` draws of the parameters, one at a time, so that they need not all be held."""
    if num < 1:
        raise ValueError(f"num must be at least 1, found {num}")
    generator = torch.Generator().manual_seed(seed) if generator is None else generator
    for _ in range(num):
        draw = posterior.sample(1, generator=generator)
        yield {name: value + draw[name][0].to(value) for name, value in parameters.items()}
