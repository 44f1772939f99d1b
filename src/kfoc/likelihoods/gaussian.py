"""Real targets around the outputs."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kfoc.likelihoods.base import Likelihood, by_sample, check_targets, unit_directions
from kfoc.likelihoods.draws import Draws
from kfoc.likelihoods.options import check_broadcast, tensor_option


@dataclass(frozen=True, eq=False)
class Gaussian(Likelihood):
    """Real targets around the outputs, of any shape (N, ...), with noise of known variance.

    `-ln p` is half the summed squared error by `var`, up to a constant: for a number, the sum of
    `nn.GaussianNLLLoss` at that variance. Its second derivative by an output is `1 / var`, and so F
    of every type but "empirical" does not depend on the targets.

    Attributes:
        var: the variance of the noise: one number, or a tensor that broadcasts to the outputs of
            one sample, such as (K,) for a variance per output.
    """

    var: float | Tensor = 1.0

    def __post_init__(self) -> None:
        found = tensor_option("Gaussian", "var", self.var, positive=True)
        object.__setattr__(self, "var", found if found.ndim else found.item())

    def check(self, outputs: Tensor, targets: object, fisher: str) -> None:
        if isinstance(self.var, Tensor):
            check_broadcast("Gaussian", "var", self.var, outputs)
        if fisher == "empirical":
            check_targets("gaussian", outputs, targets)

    def drawn(self, outputs: Tensor, targets: object, draws: Draws) -> Tensor:
        count = outputs.shape[0]
        uniform = draws.uniform(count, outputs.numel() // count, outputs.device)
        normal = torch.special.ndtri(uniform).to(outputs).view(outputs.shape)
        return normal * self._roots(outputs)

    def weighted(self, outputs: Tensor, targets: object, draws: Draws) -> Tensor:
        """A random sign for each output: the size of normal draws is all they vary in."""
        signs = draws.signs(len(outputs), outputs[0].numel(), outputs.device)
        return signs.to(outputs).view(outputs.shape) * self._roots(outputs)

    def exact(self, outputs: Tensor, targets: object) -> Iterator[Tensor]:
        return unit_directions(outputs, self._roots(outputs))

    def fisher_product(self, outputs: Tensor, targets: object, vectors: Tensor) -> Tensor:
        return vectors * self._roots(outputs).square()

    def observed(self, outputs: Tensor, targets: object) -> Tensor:
        assert isinstance(targets, Tensor)
        return (targets.to(outputs) - outputs) / self.noise_variance(outputs)

    def log_likelihood(self, outputs: Tensor, targets: Any) -> Tensor:
        normaliser = by_sample((2 * math.pi * self.noise_variance(outputs)).log()) / 2
        return -self.misfit(outputs, targets) - normaliser

    def misfit(self, outputs: Tensor, targets: Any) -> Tensor:
        errors = (targets.to(outputs) - outputs) * self._roots(outputs)
        return by_sample(errors.square()) / 2

    def num_labels(self, outputs: Tensor, targets: Any) -> Tensor:
        return by_sample(torch.ones_like(outputs))

    def noise_variance(self, outputs: Tensor) -> Tensor:
        variance = torch.as_tensor(self.var, dtype=outputs.dtype, device=outputs.device)
        return variance.expand_as(outputs)

    def _roots(self, outputs: Tensor) -> Tensor:
        """1 / standard deviation, in the shape of the outputs."""
        return self.noise_variance(outputs).rsqrt()
