"""Samples that count more or less than others."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from kfoc.likelihoods.base import Likelihood, described
from kfoc.likelihoods.draws import Draws
from kfoc.likelihoods.named import resolved


@dataclass(frozen=True)
class SampleWeighted(Likelihood):
    """Another likelihood with a weight for each sample: targets are pairs `(targets, weights)`.

    The loss is `sum_n w_n * -ln p(y_n | x_n)`, and its mean is over samples, not over weights. F is

    - "exact", "mc", "mc-plain": `1 / N sum_n w_n F_n`: a sample of weight w counts as w samples;
    - "empirical": of the samples' own losses, `1 / N sum_n w_n^2 g_n g_n^T`.

    In `Laplace` the posterior is that of the weighted loss, and the scores of `influence` are by
    the weighted terms of the loss. New samples have no weight: predictions are as without.

    Attributes:
        likelihood: "categorical", "gaussian", "bernoulli", or a `Likelihood`. Its targets are the
            first of a pair, and may be None where it needs none.
    """

    likelihood: str | Likelihood = "categorical"

    def __post_init__(self) -> None:
        object.__setattr__(self, "likelihood", resolved(self.likelihood))

    def check(self, outputs: Tensor, targets: object, fisher: str) -> None:
        if not isinstance(targets, (tuple, list)) or len(targets) != 2:
            raise ValueError(
                "the targets of SampleWeighted must be pairs (targets, weights), so that a batch "
                f"is (inputs, (targets, weights)), found {described(targets)}"
            )
        labels, weights = targets
        floating = isinstance(weights, Tensor) and not weights.is_complex()
        if not floating or weights.shape != outputs.shape[:1]:
            raise ValueError(
                f"the weights of samples must be a tensor of shape ({len(outputs)},), one for each "
                f"sample, found {described(weights)}"
            )
        if not weights.isfinite().all() or (weights < 0).any():
            raise ValueError("the weights of samples must be finite and not negative")
        self._inner.check(outputs, labels, fisher)

    def settled(self, outputs: Tensor, targets: object) -> SampleWeighted:
        # Pairs are checked after this; what is none settles nothing.
        labels = targets[0] if isinstance(targets, (tuple, list)) and targets else None
        return replace(self, likelihood=self._inner.settled(outputs, labels))

    def drawn(self, outputs: Tensor, targets: Any, draws: Draws) -> Tensor:
        return self._inner.drawn(outputs, targets[0], draws) * _by(outputs, targets).sqrt()

    def weighted(self, outputs: Tensor, targets: Any, draws: Draws) -> Tensor:
        draw = self._inner.least_varying()
        return draw(outputs, targets[0], draws) * _by(outputs, targets).sqrt()

    def exact(self, outputs: Tensor, targets: Any) -> Iterator[Tensor]:
        roots = _by(outputs, targets).sqrt()
        return (direction * roots for direction in self._inner.exact(outputs, targets[0]))

    def fisher_product(self, outputs: Tensor, targets: Any, vectors: Tensor) -> Tensor:
        found = self._inner.fisher_product(outputs, targets[0], vectors)
        return found * _by(outputs, targets)

    def observed(self, outputs: Tensor, targets: Any) -> Tensor:
        return self._inner.observed(outputs, targets[0]) * _by(outputs, targets)

    def log_likelihood(self, outputs: Tensor, targets: Any) -> Tensor:
        return self._inner.log_likelihood(outputs, targets[0]) * targets[1].to(outputs)

    def misfit(self, outputs: Tensor, targets: Any) -> Tensor:
        return self._inner.misfit(outputs, targets[0]) * targets[1].to(outputs)

    def num_labels(self, outputs: Tensor, targets: Any) -> Tensor:
        return self._inner.num_labels(outputs, targets[0]) * targets[1].to(outputs)

    def probabilities(self, outputs: Tensor) -> Tensor:
        return self._inner.probabilities(outputs)

    def moderated(self, mean: Tensor, variance: Tensor) -> Tensor:
        return self._inner.moderated(mean, variance)

    def noise_variance(self, outputs: Tensor) -> Tensor:
        return self._inner.noise_variance(outputs)

    def defines(self, method: str) -> bool:
        return self._inner.defines(method)

    def missing(self, method: str, form: str) -> ValueError:
        return self._inner.missing(method, form)

    def unweighted(self, targets: Any) -> tuple[Likelihood, Any, Tensor | None]:
        return self._inner, *targets

    @property
    def _inner(self) -> Likelihood:
        return resolved(self.likelihood)


def _by(outputs: Tensor, targets: Any) -> Tensor:
    """The weights, in dimensions that broadcast to the outputs."""
    return targets[1].to(outputs).view(-1, *[1] * (outputs.ndim - 1))
