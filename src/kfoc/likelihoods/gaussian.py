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


@dataclass(frozen=True)
class Gaussian(Likelihood):
    """Real targets with unit variance around the outputs, of any shape (N, ...).

    `-ln p` is half the summed squared error, up to a constant.
    """

    def check(self, outputs: Tensor, targets: object, fisher: str) -> None:
        if fisher == "empirical":
            check_targets("gaussian", outputs, targets)

    def drawn(self, outputs: Tensor, targets: object, draws: Draws) -> Tensor:
        count = outputs.shape[0]
        uniform = draws.uniform(count, outputs.numel() // count, outputs.device)
        return torch.special.ndtri(uniform).to(outputs).view(outputs.shape)

    def weighted(self, outputs: Tensor, targets: object, draws: Draws) -> Tensor:
        """A random sign for each output: the size of normal draws is all they vary in."""
        signs = draws.signs(len(outputs), outputs[0].numel(), outputs.device)
        return signs.to(outputs).view(outputs.shape)

    def exact(self, outputs: Tensor, targets: object) -> Iterator[Tensor]:
        return unit_directions(outputs, torch.ones_like(outputs))

    def observed(self, outputs: Tensor, targets: object) -> Tensor:
        assert isinstance(targets, Tensor)
        return targets.to(outputs) - outputs

    def log_likelihood(self, outputs: Tensor, targets: Any) -> Tensor:
        constant = 0.5 * math.log(2 * math.pi) * self.num_labels(outputs, targets)
        return -self.misfit(outputs, targets) - constant

    def misfit(self, outputs: Tensor, targets: Any) -> Tensor:
        return 0.5 * by_sample((targets.to(outputs) - outputs).square())

    def num_labels(self, outputs: Tensor, targets: Any) -> Tensor:
        return by_sample(torch.ones_like(outputs))

    def noise_variance(self, outputs: Tensor) -> Tensor:
        return torch.ones_like(outputs)
