"""Real targets whose variance is an output too."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kfoc.likelihoods.base import Likelihood, by_sample, check_targets, unit_directions
from kfoc.likelihoods.draws import Draws


@dataclass(frozen=True)
class HeteroscedasticGaussian(Likelihood):
    """Real targets around means that are outputs, with variances whose logarithms are outputs.

    The outputs (N, ..., 2 K, ...) hold the K means m, and behind them the K log variances s;
    targets are (N, ..., K, ...). `-ln p` is `(s + (y - m)^2 exp(-s) + ln 2 pi) / 2`, the sum of
    `nn.GaussianNLLLoss(full=True)` at `var = exp(s)`. Where a model gives variances in another
    form, let `predict=` put them so: F is by the parameters, and the same in every form.

    F of every type but "empirical" is the Fisher information, the expectation over the model's own
    targets: by the outputs `diag(exp(-s), 1/2)`. That is the expectation of the loss's Hessian, and
    not the Hessian, which depends on the errors and may be indefinite. A posterior has `linearised`
    and `sampled_outputs`, and no `predictive`.

    Attributes:
        dim: the dimension of means and log variances. None: that behind the samples', for outputs
            (N, 2 K); outputs of more dimensions need it.
    """

    dim: int | None = None

    def check(self, outputs: Tensor, targets: object, fisher: str) -> None:
        dim = self._dim
        if outputs.ndim < 2 or (self.dim is None and outputs.ndim > 2):
            raise ValueError(
                f"outputs of shape {tuple(outputs.shape)}: a HeteroscedasticGaussian takes "
                "(N, 2 K), or is told by dim= where means and log variances are"
            )
        inside = -outputs.ndim <= dim < outputs.ndim and dim % outputs.ndim
        if not inside or outputs.shape[dim] % 2:
            raise ValueError(
                f"outputs of shape {tuple(outputs.shape)} of a HeteroscedasticGaussian must have "
                f"an even size in dimension {dim}, for means and log variances; the first is that "
                "of the samples"
            )
        if fisher == "empirical":
            check_targets("heteroscedastic gaussian", self._halves(outputs)[0], targets, of="means")

    def drawn(self, outputs: Tensor, targets: object, draws: Draws) -> Tensor:
        mean, _ = self._halves(outputs)
        uniform = draws.uniform(len(mean), mean[0].numel(), mean.device)
        return self._score(outputs, torch.special.ndtri(uniform).to(mean).view(mean.shape))

    def weighted(self, outputs: Tensor, targets: object, draws: Draws) -> Tensor:
        """A random sign for each output, times the root of its information."""
        signs = draws.signs(len(outputs), outputs[0].numel(), outputs.device)
        return signs.to(outputs).view(outputs.shape) * self._roots(outputs)

    def exact(self, outputs: Tensor, targets: object) -> Iterator[Tensor]:
        return unit_directions(outputs, self._roots(outputs))

    def fisher_product(self, outputs: Tensor, targets: object, vectors: Tensor) -> Tensor:
        return vectors * self._roots(outputs).square()

    def observed(self, outputs: Tensor, targets: object) -> Tensor:
        assert isinstance(targets, Tensor)
        mean, log_variance = self._halves(outputs)
        return self._score(outputs, (targets.to(mean) - mean) * (-log_variance / 2).exp())

    def log_likelihood(self, outputs: Tensor, targets: Any) -> Tensor:
        mean, log_variance = self._halves(outputs)
        squares = (targets.to(mean) - mean).square() * (-log_variance).exp()
        return -by_sample(squares + log_variance + math.log(2 * math.pi)) / 2

    def num_labels(self, outputs: Tensor, targets: Any) -> Tensor:
        return by_sample(torch.ones_like(self._halves(outputs)[0]))

    def _score(self, outputs: Tensor, errors: Tensor) -> Tensor:
        """The derivative of `ln p` by the outputs, from errors in standard deviations."""
        _, log_variance = self._halves(outputs)
        parts = errors * (-log_variance / 2).exp(), (errors.square() - 1) / 2
        return torch.cat(parts, self._dim)

    def _roots(self, outputs: Tensor) -> Tensor:
        _, log_variance = self._halves(outputs)
        parts = (-log_variance / 2).exp(), torch.full_like(log_variance, 0.5**0.5)
        return torch.cat(parts, self._dim)

    def _halves(self, outputs: Tensor) -> tuple[Tensor, Tensor]:
        """Means and log variances."""
        mean, log_variance = outputs.chunk(2, self._dim)
        return mean, log_variance

    @property
    def _dim(self) -> int:
        return 1 if self.dim is None else self.dim
