"""Independent binary labels."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from kfoc.likelihoods.base import Likelihood, check_targets, unit_directions
from kfoc.likelihoods.draws import Draws


@dataclass(frozen=True)
class Bernoulli(Likelihood):
    """Independent binary labels of any shape (N, ...); the outputs are logits."""

    def check(self, outputs: Tensor, targets: object, fisher: str) -> None:
        if fisher != "empirical":
            return
        labels = check_targets("bernoulli", outputs, targets)
        wrong = (labels < 0) | (labels > 1)
        if wrong.any():
            raise ValueError(
                f"label {labels[wrong][0].item()} is out of range for a bernoulli likelihood, "
                "whose labels lie between 0 and 1"
            )

    def drawn(self, outputs: Tensor, targets: object, draws: Draws) -> Tensor:
        uniform = draws.uniform(len(outputs), outputs[0].numel(), outputs.device)
        probabilities = outputs.sigmoid()
        labels = uniform.view(outputs.shape) < probabilities
        return torch.where(labels, (-outputs).sigmoid(), -probabilities)

    def weighted(self, outputs: Tensor, targets: object, draws: Draws) -> Tensor:
        """A random sign for each output, times its standard deviation."""
        signs = draws.signs(len(outputs), outputs[0].numel(), outputs.device)
        return signs.to(outputs).view(outputs.shape) * self._deviations(outputs)

    def exact(self, outputs: Tensor, targets: object) -> Iterator[Tensor]:
        return unit_directions(outputs, self._deviations(outputs))

    def _deviations(self, outputs: Tensor) -> Tensor:
        """sqrt(p (1 - p)); 1 - sigmoid(z) is sigmoid(-z), which keeps its digits."""
        return outputs.sigmoid().sqrt() * (-outputs).sigmoid().sqrt()

    def fisher_product(self, outputs: Tensor, targets: object, vectors: Tensor) -> Tensor:
        return vectors * self._deviations(outputs).square()

    def observed(self, outputs: Tensor, targets: object) -> Tensor:
        assert isinstance(targets, Tensor)
        labels = targets.to(outputs)  # y - p, with p near 1 too
        return labels * (-outputs).sigmoid() - (1 - labels) * outputs.sigmoid()
