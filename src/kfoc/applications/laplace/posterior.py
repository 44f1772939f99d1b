"""The Laplace posterior of a trained model."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from kfoc.applications.laplace import evidence, predictive, tuning
from kfoc.applications.laplace.evidence import DataFit
from kfoc.applications.laplace.linearised import Chunks, Linearised
from kfoc.applications.laplace.predictive import OutputGaussian
from kfoc.applications.laplace.prior import Number, Precisions, positive, precisions
from kfoc.applications.laplace.validation import Validation, validation_losses
from kfoc.common.ambient import Plain
from kfoc.common.arguments import check_model, one_of, whole
from kfoc.curvature.curvature import Curvature
from kfoc.curvature.damped import DampedCurvature
from kfoc.likelihoods.base import Likelihood
from kfoc.likelihoods.named import resolved
from kfoc.model.batches import Predict
from kfoc.model.functional import Forward, concerning
from kfoc.parameters.layout import covered

PREDICTIVE_METHODS = ("linearised", "weights")
PROBABILITY_METHODS = ("probit", "logits", "weights")
Moments = Callable[[Linearised, Any, Tensor, Sequence[DampedCurvature]], Chunks]
# Of prior precisions: from 0.01 to 10,000.
CANDIDATES = tuple(10 ** (k / 2) for k in range(-4, 9))


@dataclass(frozen=True, eq=False, repr=False)
class Laplace(Plain):
    """A Gaussian over the parameters, around the trained ones, of precision

        num_samples / (temperature * sigma_noise^2) * F + prior_precision * I

    with F the mean Fisher of the curvature, a Gauss-Newton stand-in for the Hessian. Parameters
    that the curvature does not cover (`curvature.skipped`, layers left out of `fit(layers=...)`)
    are certain: they stay at their trained values in everything below. A last-layer posterior is
    one of a curvature fitted with that layer alone.

    Nothing is computed before it is asked for; the model is never changed, and read at each call:
    it must hold the parameters that the curvature was fitted at, in eval mode. Inputs are a
    batch as `fit` takes it, all tensors with the samples in their first dimension.

    Attributes:
        model: the trained model.
        curvature: its curvature, of the same likelihood.
        prior_precision: of the zero-mean Gaussian prior: one positive number, or one for each
            layer of the curvature by name. Minus the log prior is
            `prior_precision / 2 * |parameters|^2`, on the scale of the *summed* loss: a weight
            decay `w` on the mean loss is `w * num_samples`.
        likelihood: "categorical", "gaussian", "bernoulli", or a `Likelihood`.
        sigma_noise: the standard deviation of a regression's noise by its likelihood's own, or 1.
        temperature: of the likelihood, which is taken to the power of `1 / temperature`.
        num_samples: of the training data, where the curvature has seen a part of it.
        predict: `(model, inputs) -> outputs`, for models that return more than a tensor.
    """

    model: nn.Module
    curvature: Curvature
    prior_precision: Precisions = 1.0
    likelihood: str | Likelihood = "categorical"
    sigma_noise: Number = 1.0
    temperature: float = 1.0
    num_samples: int | None = None
    predict: Predict | None = None

    def __post_init__(self) -> None:
        check_model(self.model)
        resolved(self.likelihood)
        self._sigma(self.sigma_noise)
        if not 0 < self.temperature < math.inf:
            raise ValueError(f"temperature must be finite and positive, found {self.temperature}")
        if self.num_samples is not None:
            whole("num_samples", self.num_samples, 1)
        if not len(self.curvature):
            raise ValueError("the curvature has no layers: there is nothing to be uncertain about")
        precisions(self.curvature.layers, self.prior_precision)

    @cached_property
    def posterior(self) -> DampedCurvature:
        """The precision of the posterior, factorised: to solve with, and to draw from."""
        priors = precisions(self.curvature.layers, self.prior_precision)
        scale = self._scale(self._sigma(self.sigma_noise)).item()
        return self._factorised.redamped({k: p.item() for k, p in priors.items()}, scale=scale)

    def sample(
        self, num: int = 1, *, seed: int = 0, generator: torch.Generator | None = None
    ) -> dict[str, Tensor]:
        """Draws of the parameters, name -> (num, *shape), for `torch.func.functional_call`.

        Args:
            seed: as in `DampedCurvature.sample`; the global state is not touched.
            generator: likewise.
        """
        draws = self.posterior.sample(num, seed=seed, generator=generator)
        return {name: value + draws[name].to(value) for name, value in self._parameters.items()}

    def sampled_outputs(self, inputs: Any, num: int = 30, *, seed: int = 0) -> Tensor:
        """Outputs (num, N, ...) of networks drawn from the posterior, the same for one seed."""
        forward = self._forward
        inputs = forward.moved(inputs)
        with concerning("inputs"):
            forward.trained(inputs)
        drawn = predictive.networks(self.posterior, self._parameters, num, seed)
        return predictive.outputs_of(drawn, forward, inputs)

    def linearised(self, inputs: Any, *, chunk_size: int | None = None) -> OutputGaussian:
        """The Gaussian over the outputs of the model linearised at its trained parameters.

        Mean `f(x)` and covariance `J B^-1 J^T`, with J each sample's Jacobian by the covered
        parameters: without observation noise.

        Args:
            chunk_size: samples whose Jacobians are held at once; None: as 128 MiB allow. A last
                linear layer alone needs none: its covariances are held.
        """
        return OutputGaussian(*self._moments(inputs, chunk_size, Linearised.covariances))

    def variances(self, inputs: Any, *, chunk_size: int | None = None) -> Tensor:
        """The variances of the same Gaussian, in the outputs' shape, without its covariances.

        For outputs of many numbers, such as images: takes K numbers a sample, not K squared.
        """
        return self._moments(inputs, chunk_size, Linearised.variances)[1]

    def predictive(
        self,
        inputs: Any,
        method: str = "linearised",
        *,
        num: int = 100,
        seed: int = 0,
        chunk_size: int | None = None,
    ) -> OutputGaussian:
        """The predictive distribution of a regression's targets, noise included.

        Args:
            method: "linearised": the closed form; "weights": mean and covariance over the outputs
                of `num` networks drawn from the posterior.
        """
        one_of("method", method, PREDICTIVE_METHODS)
        self._require("noise_variance", "use probabilities(), linearised() or sampled_outputs()")
        if method == "linearised":
            return self._noisy(self.linearised(inputs, chunk_size=chunk_size))
        if num < 2:
            raise ValueError(f"num must be at least 2 for a covariance, found {num}")
        return self._noisy(predictive.moments(self.sampled_outputs(inputs, num, seed=seed)))

    def probabilities(
        self,
        inputs: Any,
        method: str = "probit",
        *,
        num: int = 100,
        seed: int = 0,
        chunk_size: int | None = None,
    ) -> Tensor:
        """Predictive probabilities of the classes, in the shape of the outputs.

        Args:
            method: "probit": the closed form for the linearised model, approximate; "logits": the
                mean over `num` draws of the linearised model's outputs; "weights": the mean over
                `num` networks drawn from the posterior, which fits worse as a rule, as the
                posterior is one of the linearised model (Immer et al. 2021).
        """
        one_of("method", method, PROBABILITY_METHODS)
        self._require("probabilities", "use predictive() for a regression, or sampled_outputs()")
        if method == "probit":
            self._require("moderated", 'use method="logits" or "weights"')
        likelihood = self._likelihood
        if method == "weights":
            outputs = self.sampled_outputs(inputs, num, seed=seed)
            return torch.stack([likelihood.probabilities(each) for each in outputs]).mean(0)
        if method == "probit":
            moments = self._moments(inputs, chunk_size, Linearised.variances)
            return likelihood.probabilities(likelihood.moderated(*moments))
        gaussian = self.linearised(inputs, chunk_size=chunk_size)
        return predictive.monte_carlo(likelihood, gaussian, num, seed)

    def data_fit(self, data: Iterable[tuple[Any, Any]]) -> DataFit:
        """What the marginal likelihood needs of the training data: one pass, once."""
        return evidence.measured(self._forward, self._likelihood, data)

    def log_marginal_likelihood(
        self,
        data: DataFit | Iterable[tuple[Any, Any]],
        *,
        prior_precision: Precisions | None = None,
        sigma_noise: Number | None = None,
    ) -> Tensor:
        """`ln p(training targets | prior)` by Laplace's method, a scalar in float64.

        Differentiable in `prior_precision` and `sigma_noise` where those are tensors; the
        curvature is factorised once for all calls.

        Args:
            data: the training data, all of it; or `data_fit` of it.
            prior_precision: in place of this object's.
            sigma_noise: likewise.

        Raises:
            ValueError: data of another number of samples than the posterior's.
        """
        fit = self._checked_fit(data)
        prior = self.prior_precision if prior_precision is None else prior_precision
        sigma = self._sigma(self.sigma_noise if sigma_noise is None else sigma_noise)
        log_likelihood = fit.log_likelihood(sigma) / self.temperature
        return evidence.log_marginal_likelihood(
            log_likelihood,
            self._factorised,
            self._squared_norms,
            precisions(self.curvature.layers, prior),
            self._scale(sigma),
        )

    def tuned(
        self,
        data: DataFit | Iterable[tuple[Any, Any]],
        *,
        per_layer: bool = False,
        noise: bool = False,
        bounds: tuple[float, float] = (1e-6, 1e8),
    ) -> Laplace:
        """With the prior precision that maximises the marginal likelihood.

        By search along each of them: layers do not depend on each other in it, so the maximum is
        the maximum of all. Works for every kind of block.

        Args:
            data: as for `log_marginal_likelihood`.
            per_layer: a precision for every layer, in place of one for all.
            noise: maximise over `sigma_noise` of a regression as well, jointly.
            bounds: of the prior precision. A RuntimeWarning tells where the best is at one.
        """
        fit = self._checked_fit(data)
        posterior, norms = self._factorised, self._squared_norms

        def best(sigma: Tensor) -> tuple[float | dict[str, float], float]:
            return tuning.best_prior(posterior, norms, self._scale(sigma), per_layer, bounds)

        changes: dict[str, Any] = {}
        sigma = self._sigma(self.sigma_noise)
        if noise:
            self._require("noise_variance", "noise=True is for the gaussian likelihood")
            changes["sigma_noise"] = tuning.best_noise(
                fit, self.temperature, lambda sigma: best(sigma)[1]
            )
            sigma = positive("sigma_noise", changes["sigma_noise"])
        prior, _ = best(sigma)
        found = prior if isinstance(prior, dict) else {"": prior}
        for layer, precision in found.items():
            of_layer = f" of layer {layer!r}" if per_layer else ""
            tuning.warn_at_bound(precision, bounds, f"prior precision{of_layer}")
        return self._changed(prior_precision=prior, **changes)

    def validated(
        self,
        data: Iterable[tuple[Any, Any]],
        candidates: Iterable[float] = CANDIDATES,
        *,
        temperatures: Iterable[float] | None = None,
        chunk_size: int | None = None,
    ) -> Validation:
        """How well data not trained on is predicted with each prior precision, and without any.

        By the mean negative log-likelihood of the linearised predictive: of the targets jointly in
        a regression, of the probit's probabilities for classes and binary labels, over draws for a
        likelihood of your own. The Jacobians are taken once for all candidates.

        Args:
            candidates: of the prior precision: 0.01 to 10,000 by half decades.
            temperatures: with each of which all candidates are tried; None: this object's.

        Raises:
            ValueError: data with values that are not finite; the message names the batch.
        """
        kept = [self.temperature] if temperatures is None else map(float, temperatures)
        pairs = list(product(map(float, candidates), kept))
        if not pairs:
            raise ValueError("candidates and temperatures must hold at least one number each")
        losses, plain = validation_losses(
            Linearised(self._forward, self.curvature.layouts, chunk_size),
            self._likelihood,
            [self._changed(prior_precision=p, temperature=t).posterior for p, t in pairs],
            float(self.sigma_noise),
            data,
        )
        return Validation(dict(zip(pairs, losses, strict=True)), plain)

    def tuned_by_validation(
        self,
        data: Iterable[tuple[Any, Any]],
        candidates: Iterable[float] = CANDIDATES,
        *,
        temperatures: Iterable[float] | None = None,
        chunk_size: int | None = None,
    ) -> Laplace:
        """With the prior precision, and temperature, that predict data not trained on best.

        A RuntimeWarning tells where the best candidate is the smallest or the largest, and where
        the network by itself predicts the data better: `validated` has the whole table. Arguments
        and errors are those of `validated`.
        """
        found = self.validated(data, candidates, temperatures=temperatures, chunk_size=chunk_size)
        tuning.warn_of_candidate(found)
        prior, temperature = found.best
        return self._changed(prior_precision=prior, temperature=temperature)

    def __repr__(self) -> str:
        priors = precisions(self.curvature.layers, self.prior_precision)
        same = len({p.item() for p in priors.values()}) == 1
        shown = {"all": next(iter(priors.values()))} if same else priors
        values = ", ".join(f"{layer}: {p.item():.4g}" for layer, p in shown.items())
        return f"Laplace of {len(self.curvature)} layers, prior precision {values}"

    @property
    def _likelihood(self) -> Likelihood:
        return resolved(self.likelihood)

    @property
    def _forward(self) -> Forward:
        forward = Forward(self.model, self.predict)
        forward.check_deterministic()
        return forward

    def _moments(
        self, inputs: Any, chunk_size: int | None, moments: Moments
    ) -> tuple[Tensor, Tensor]:
        """The outputs, and their covariances or variances."""
        forward = self._forward
        linearised = Linearised(forward, self.curvature.layouts, chunk_size)
        inputs = forward.moved(inputs)
        with concerning("inputs"):
            mean = forward.trained(inputs)
            parts = [found for _, (found,) in moments(linearised, inputs, mean, [self.posterior])]
        return mean, torch.cat(parts)

    @property
    def _parameters(self) -> dict[str, Tensor]:
        """The trained values of the covered parameters."""
        names = covered(self.curvature.layouts)
        return Forward(self.model, self.predict).parameters(names)

    @property
    def _squared_norms(self) -> dict[str, float]:
        values = self._parameters
        return {
            layer: sum(values[name].double().square().sum().item() for name in layout.names)
            for layer, layout in self.curvature.layouts.items()
        }

    @cached_property
    def _factorised(self) -> DampedCurvature:
        """With a damping and a scale that are of no account: for `redamped` alone.

        It is by eigenvalues, as any precision and derivatives by it need them.
        """
        return self.curvature.damped(1.0).redamped(1.0)

    def _changed(self, **changes: Any) -> Laplace:
        """Another object of the same curvature, which shares its factorisation."""
        changed = replace(self, **changes)
        vars(changed)["_factorised"] = self._factorised
        return changed

    def _sigma(self, value: Number) -> Tensor:
        sigma = positive("sigma_noise", value)
        if sigma.item() != 1:
            self._require("noise_variance", f"sigma_noise must be 1, found {value}")
        return sigma

    def _noisy(self, outputs: OutputGaussian) -> OutputGaussian:
        """Of the targets: with the noise around the outputs."""
        variance = self._likelihood.noise_variance(outputs.mean)
        return outputs.with_noise(float(self.sigma_noise) * variance.sqrt())

    def _require(self, method: str, otherwise: str) -> None:
        """Raise where the likelihood lacks an optional method, before anything is computed."""
        if not self._likelihood.defines(method):
            raise self._likelihood.missing(method, f": {otherwise}")

    def _scale(self, sigma: Tensor) -> Tensor:
        count = self.num_samples or self.curvature.num_samples
        return count / (self.temperature * sigma**2)

    def _checked_fit(self, data: DataFit | Iterable[tuple[Any, Any]]) -> DataFit:
        fit = data if isinstance(data, DataFit) else self.data_fit(data)
        fit.check(self.num_samples or self.curvature.num_samples)
        return fit
