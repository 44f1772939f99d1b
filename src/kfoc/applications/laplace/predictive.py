"""What a Gaussian over parameters says about outputs: linearised, or by drawing networks."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kfoc.common.arguments import whole
from kfoc.curvature.damped import DampedCurvature
from kfoc.likelihoods.base import Likelihood
from kfoc.likelihoods.draws import Draws
from kfoc.model.functional import Forward

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
        sigma = torch.as_tensor(sigma, dtype=self.mean.dtype, device=self.mean.device)
        variance = sigma.square().expand_as(self.mean)
        return OutputGaussian(self.mean, self.covariance + variance.flatten(1).diag_embed())


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


def moments(outputs: Tensor) -> OutputGaussian:
    """Mean and covariance over outputs (num, N, ...), of two networks or more."""
    mean = outputs.mean(0)
    centred = (outputs - mean).flatten(2).movedim(0, 1)  # (N, num, K)
    return OutputGaussian(mean, centred.mT @ centred / (len(outputs) - 1))


@torch.no_grad()
def outputs_of(drawn: Iterable[Parameters], forward: Forward, inputs: Any) -> Tensor:
    """Outputs (num, N, ...) of networks.

    Raises:
        ValueError: values that are not finite.
    """
    found = torch.stack([forward.outputs(inputs, parameters) for parameters in drawn])
    if not found.isfinite().all():
        raise ValueError(
            "outputs of networks drawn from the posterior are not finite: a larger "
            "prior_precision draws them closer to the trained one"
        )
    return found


def networks(
    posterior: DampedCurvature, parameters: Parameters, num: int, seed: int
) -> Iterator[dict[str, Tensor]]:
    """`num` draws of the parameters, one at a time, so that they need not all be held."""
    num = whole("num", num, 1)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(num):
        draw = posterior.sample(1, generator=generator)
        yield {name: value + draw[name][0].to(value) for name, value in parameters.items()}
