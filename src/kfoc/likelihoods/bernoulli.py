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
from kfoc.likelihoods.options import check_broadcast, tensor_option


@dataclass(frozen=True, eq=False)
class Bernoulli(Likelihood):
    """Independent binary labels of any shape (N, ...); the outputs are logits.

    Labels between 0 and 1 are soft ones. The loss is the sum of `nn.BCEWithLogitsLoss` with the
    same `pos_weight`. F is

    - "exact", "mc", "mc-plain": the second derivative of the loss by the outputs, `W p (1 - p)`
      with `W = 1 + (pos_weight - 1) y`. Without `pos_weight` W is 1, and F the Fisher information.
      With it a label counts W times as it was observed, whatever is drawn: labels are needed.
    - "empirical": of the gradients of the samples' own losses: `pos_weight` enters it squared.

    Attributes:
        pos_weight: how many times a label of 1 counts, where one of 0 counts once: a number, or a
            tensor that broadcasts to the outputs of one sample, such as (K,).
    """

    pos_weight: float | Tensor | None = None

    def __post_init__(self) -> None:
        if self.pos_weight is not None:
            found = tensor_option("Bernoulli", "pos_weight", self.pos_weight)
            object.__setattr__(self, "pos_weight", found)

    def check(self, outputs: Tensor, targets: object, fisher: str) -> None:
        needed = 'fisher="empirical"'
        if isinstance(self.pos_weight, Tensor):
            needed = "pos_weight"
            check_broadcast("Bernoulli", "pos_weight", self.pos_weight, outputs)
        elif fisher != "empirical":
            return
        labels = check_targets("bernoulli", outputs, targets, needed)
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
        score = torch.where(labels, (-outputs).sigmoid(), -probabilities)
        return score * self._importance(outputs, targets).sqrt()

    def weighted(self, outputs: Tensor, targets: object, draws: Draws) -> Tensor:
        """A random sign for each output, times its standard deviation."""
        signs = draws.signs(len(outputs), outputs[0].numel(), outputs.device)
        return signs.to(outputs).view(outputs.shape) * self._roots(outputs, targets)

    def exact(self, outputs: Tensor, targets: object) -> Iterator[Tensor]:
        return unit_directions(outputs, self._roots(outputs, targets))

    def fisher_product(self, outputs: Tensor, targets: object, vectors: Tensor) -> Tensor:
        return vectors * self._roots(outputs, targets).square()

    def observed(self, outputs: Tensor, targets: object) -> Tensor:
        assert isinstance(targets, Tensor)
        labels = targets.to(outputs)  # y - p, with p near 1 too
        positive = labels * self._pos_weight(outputs)
        return positive * (-outputs).sigmoid() - (1 - labels) * outputs.sigmoid()

    def log_likelihood(self, outputs: Tensor, targets: Any) -> Tensor:
        losses = functional.binary_cross_entropy_with_logits(
            outputs, targets.to(outputs), reduction="none", pos_weight=self._pos_weight(outputs)
        )
        return -by_sample(losses)

    def num_labels(self, outputs: Tensor, targets: Any) -> Tensor:
        return by_sample(self._importance(outputs, targets))

    def probabilities(self, outputs: Tensor) -> Tensor:
        """Of a label of 1."""
        return outputs.sigmoid()

    def moderated(self, mean: Tensor, variance: Tensor) -> Tensor:
        return probit(mean, variance)

    def _roots(self, outputs: Tensor, targets: object) -> Tensor:
        """sqrt(p (1 - p)), by what a label counts; 1 - sigmoid(z) is sigmoid(-z): its digits."""
        deviations = outputs.sigmoid().sqrt() * (-outputs).sigmoid().sqrt()
        return deviations * self._importance(outputs, targets).sqrt()

    def _importance(self, outputs: Tensor, targets: object) -> Tensor:
        """How many times each label counts, in the shape of the outputs."""
        if self.pos_weight is None:
            return torch.ones_like(outputs)
        assert isinstance(targets, Tensor)
        return 1 + (self._pos_weight(outputs) - 1) * targets.to(outputs)

    def _pos_weight(self, outputs: Tensor) -> Tensor:
        return torch.as_tensor(1.0 if self.pos_weight is None else self.pos_weight).to(outputs)
