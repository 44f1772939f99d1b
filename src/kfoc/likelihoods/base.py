"""Likelihood and Fisher type to output cotangents, formed from the model's outputs alone.

A cotangent is a derivative of `ln p(y | x)` by the outputs, per sample and not reduced, so the
reduction of the user's loss never enters. Draws are a function of the seed and of the sample's
index in the data set, so they do not depend on batch size, pass, rank or the global generator.

Of a sure model nearly all of the Fisher comes from labels that are hardly ever drawn. "mc" draws
by what a label contributes and weights it for that (docs/draws.md); "mc-plain" from the model.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from kfoc.likelihoods.draws import Draws

FISHER_TYPES = ("mc", "mc-plain", "exact", "empirical")


class Likelihood(ABC):
    """What the outputs mean. Subclass it for a likelihood of your own.

    All cotangents have the shape of the outputs, whose first dimension is the samples. A fit and
    influence ask for the abstract methods. `Laplace` asks for more, and says what it misses:

    | optional method | for |
    |---|---|
    | `log_likelihood` | marginal likelihoods and `tuned_by_validation` |
    | `probabilities` | `Laplace.probabilities` |
    | `moderated` | its closed form, `"probit"` |
    | `noise_variance`, with `misfit` | `Laplace.predictive` and `sigma_noise`: labels that are Gaussian |
    | `num_labels` | the mean in `tuned_by_validation`, where samples have several labels |
    """  # noqa: E501

    @abstractmethod
    def check(self, outputs: Tensor, targets: object, fisher: str) -> None:
        """Raise ValueError where outputs or targets do not fit."""

    @abstractmethod
    def drawn(self, outputs: Tensor, targets: object, draws: Draws) -> Tensor:
        """The cotangent at labels drawn from the model."""

    def weighted(self, outputs: Tensor, targets: object, draws: Draws) -> Tensor:
        """A random cotangent of mean zero and of the covariance of `drawn`, for less variance.

        `drawn` where a likelihood has no better one.
        """
        return self.drawn(outputs, targets, draws)

    @abstractmethod
    def exact(self, outputs: Tensor, targets: object) -> Iterator[Tensor]:
        """Cotangents whose outer products add up to the expectation over the model's labels."""

    @abstractmethod
    def observed(self, outputs: Tensor, targets: object) -> Tensor:
        """The cotangent at the observed labels."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "exact" in vars(cls) and "fisher_product" not in vars(cls):
            # One that is inherited may be the closed form of another `exact`.
            setattr(cls, "fisher_product", Likelihood.fisher_product)  # noqa: B010 (for mypy)

    def fisher_product(self, outputs: Tensor, targets: object, vectors: Tensor) -> Tensor:
        """The Fisher by the outputs, that of `exact`, times vectors (k, N, ...) over them.

        One product for each direction of `exact`, where a likelihood has nothing better.
        """
        return outer_products(self.exact(outputs, targets), vectors)

    def settled(self, outputs: Tensor, targets: object) -> Likelihood:
        """The likelihood for this batch and those after it, where a batch leaves something open."""
        return self

    def log_likelihood(self, outputs: Tensor, targets: Any) -> Tensor:
        """`ln p(targets)` of every sample, (N,), constants included; `check` has passed them.

        Labels that do not count add nothing.
        """
        raise self.missing("log_likelihood", "(outputs, targets) -> (N,)")

    def misfit(self, outputs: Tensor, targets: Any) -> Tensor:
        """Minus the part of `ln p(targets)` that the outputs change, (N,).

        All of it, unless there is a `noise_variance`: then half the squared errors by that.
        """
        if self.defines("noise_variance"):
            raise self.missing("misfit", "(outputs, targets) -> (N,), half the squared errors")
        return -self.log_likelihood(outputs, targets)

    def num_labels(self, outputs: Tensor, targets: Any) -> Tensor:
        """How many labels every sample has, (N,)."""
        return outputs.new_ones(len(outputs))

    def probabilities(self, outputs: Tensor) -> Tensor:
        """The mean of the labels at these outputs, (N, ...): of classes, their probabilities."""
        raise self.missing("probabilities", "(outputs) -> (N, ...)")

    def moderated(self, mean: Tensor, variance: Tensor) -> Tensor:
        """The outputs at which `probabilities` are about their mean over Gaussian outputs."""
        raise self.missing("moderated", "(mean, variance) -> outputs")

    def noise_variance(self, outputs: Tensor) -> Tensor:
        """Of labels that are Gaussian around the outputs, in their shape."""
        raise self.missing("noise_variance", "(outputs) -> variances")

    def unweighted(self, targets: Any) -> tuple[Likelihood, Any, Tensor | None]:
        """The likelihood without samples' weights, its targets, and the weights (N,) if any."""
        return self, targets, None

    def defines(self, method: str) -> bool:
        """Whether it has one of the optional methods."""
        return getattr(type(self), method) is not getattr(Likelihood, method)

    def missing(self, method: str, form: str) -> ValueError:
        """The error for an optional method that it does not define."""
        return ValueError(f"the likelihood {type(self).__name__} has no method {method}{form}")

    def cotangents(
        self, outputs: Tensor, targets: object, fisher: str, mc_samples: int, seed: int, index: int
    ) -> Iterator[Tensor]:
        """All directions of a Fisher type, one at a time.

        Args:
            outputs: (N, ...), detached.
            targets: the batch's labels; may be None but for "empirical" and weights by label.
            fisher: "mc" (of `weighted`), "mc-plain" (of `drawn`), "exact" or "empirical".
            mc_samples: directions of the first two, each scaled by `1 / sqrt(mc_samples)`.
            seed: of the draws.
            index: of the draws: the first sample's position in the data set.
        """
        self.check(outputs, targets, fisher)
        if fisher in ("mc", "mc-plain"):
            draw = self.least_varying() if fisher == "mc" else self.drawn
            for direction in range(mc_samples):
                cotangent = draw(outputs, targets, Draws(seed, index, direction, mc_samples))
                yield cotangent if mc_samples == 1 else cotangent / math.sqrt(mc_samples)
        elif fisher == "exact":
            yield from self.exact(outputs, targets)
        else:
            yield self.observed(outputs, targets)

    def least_varying(self) -> Callable[[Tensor, object, Draws], Tensor]:
        """`weighted`; of a subclass that has only `drawn` anew, that: it may mean other labels."""
        own = next(c for c in type(self).__mro__ if {"weighted", "drawn"} & vars(c).keys())
        return self.weighted if "weighted" in vars(own) else self.drawn


def probit(mean: Tensor, variance: Tensor) -> Tensor:
    """Logits whose sigmoid is about its mean over Gaussian ones (MacKay 1992; Spiegelhalter 1990).

    A sigmoid is exact up to its probit stand-in; a softmax takes each logit's variance alone.
    """
    return mean / (1 + math.pi / 8 * variance).sqrt()


def by_sample(values: Tensor) -> Tensor:
    """Sums (N,) of values (N, ...)."""
    return values.reshape(len(values), -1).sum(1)


def outer_products(cotangents: Iterable[Tensor], vectors: Tensor) -> Tensor:
    """Each sample's `sum_s c_s c_s^T v`, (k, N, ...), of cotangents c (N, ...)."""
    total = torch.zeros_like(vectors)
    for cotangent in cotangents:
        inner = (vectors * cotangent).flatten(2).sum(2)
        total += inner.view(*inner.shape, *[1] * (cotangent.ndim - 1)) * cotangent
    return total


def unit_directions(outputs: Tensor, weights: Tensor) -> Iterator[Tensor]:
    """One cotangent per output, which has that output's weight there and zeros elsewhere."""
    flat = weights.reshape(len(outputs), -1)
    for c in range(flat.shape[1]):
        cotangent = torch.zeros_like(flat)
        cotangent[:, c] = flat[:, c]
        yield cotangent.view(outputs.shape)


def check_targets(
    likelihood: str,
    outputs: Tensor,
    targets: object,
    needed: str = 'fisher="empirical"',
    of: str = "outputs",
) -> Tensor:
    if not isinstance(targets, Tensor) or targets.shape != outputs.shape:
        raise ValueError(
            f"{needed} with a {likelihood} likelihood needs targets of the shape "
            f"{tuple(outputs.shape)} of the {of}, found {described(targets)}"
        )
    if targets.is_complex():
        raise ValueError(f"the targets of a {likelihood} likelihood are complex ({targets.dtype})")
    if not targets.isfinite().all():
        raise ValueError("the targets have values that are not finite")
    return targets


def described(targets: object) -> str:
    if isinstance(targets, Tensor):
        return f"a tensor of {targets.dtype} of shape {tuple(targets.shape)}"
    return type(targets).__name__
