"""What a Gaussian over parameters says about outputs: linearised, or by drawing networks."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kfoc.common.arguments import whole
from kfoc.curvature.damped import DampedCurvature
from kfoc.likelihoods.base import Likelihood
from kfoc.likelihoods.draws import Draws
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

    def with_noise(self, sigma: float | Tensor) -> OutputGaussian:
        """With independent noise of standard deviation `sigma` on every output.

        Args:
            sigma: one for all, or a tensor of the shape of `mean`.
        """
        variance = torch.as_tensor(sigma).to(self.mean).square().expand_as(self.mean)
        return OutputGaussian(self.mean, self.covariance + variance.flatten(1).diag_embed())


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


def monte_carlo(likelihood: Likelihood, outputs: OutputGaussian, num: int, seed: int) -> Tensor:
    """Mean probabilities (N, ...) over `num` draws of the outputs."""
    drawn = (likelihood.probabilities(each) for each in draws(outputs, num, seed))
    return functools.reduce(torch.add, drawn) / num


def draws(outputs: OutputGaussian, num: int, seed: int, first: int = 0) -> Iterator[Tensor]:
    """`num` draws of the outputs, one at a time: functions of the seed and the sample's index.

    Args:
        first: index of the first sample.
    """
    num = whole("num", num, 1)
    values, vectors = torch.linalg.eigh(outputs.covariance)
    root = vectors * values.clamp_min(0).sqrt()[:, None]  # a root, where rounding has no Cholesky
    count, size = root.shape[:2]
    for number in range(num):
        uniform = Draws(seed, first, number).uniform(count, size, root.device)
        noise = torch.special.ndtri(uniform).to(root)[..., None]
        yield outputs.mean + (root @ noise).reshape(outputs.mean.shape)


def networks(
    posterior: DampedCurvature,
    parameters: Parameters,
    num: int,
    seed: int,
    generator: torch.Generator | None = None,
) -> Iterator[dict[str, Tensor]]:
    """`num` draws of the parameters, one at a time, so that they need not all be held."""
    num = whole("num", num, 1)
    generator = torch.Generator().manual_seed(seed) if generator is None else generator
    for _ in range(num):
        draw = posterior.sample(1, generator=generator)
        yield {name: value + draw[name][0].to(value) for name, value in parameters.items()}
