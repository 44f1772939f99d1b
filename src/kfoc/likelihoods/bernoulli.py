"""Independent binary labels."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from kfoc.likelihoods.base import Likelihood, by_sample, check_targets, probit, unit_directions
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

    def observed(self, outputs: Tensor, targets: object) -> Tensor:
        assert isinstance(targets, Tensor)
        labels = targets.to(outputs)  # y - p, with p near 1 too
        return labels * (-outputs).sigmoid() - (1 - labels) * outputs.sigmoid()

    def log_likelihood(self, outputs: Tensor, targets: Any) -> Tensor:
        labels = targets.to(outputs)
        return -by_sample(
            functional.binary_cross_entropy_with_logits(outputs, labels, reduction="none")
        )

    def num_labels(self, outputs: Tensor, targets: Any) -> Tensor:
        return by_sample(torch.ones_like(outputs))

    def probabilities(self, outputs: Tensor) -> Tensor:
        """Of a label of 1."""
        return outputs.sigmoid()

    def moderated(self, mean: Tensor, variance: Tensor) -> Tensor:
        return probit(mean, variance)
