"""Real targets around the outputs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from kfoc.likelihoods.base import Likelihood, check_targets, unit_directions
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

    def fisher_product(self, outputs: Tensor, targets: object, vectors: Tensor) -> Tensor:
        return vectors

    def observed(self, outputs: Tensor, targets: object) -> Tensor:
        assert isinstance(targets, Tensor)
        return targets.to(outputs) - outputs
