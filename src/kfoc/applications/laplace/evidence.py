"""The log marginal likelihood of the Laplace approximation, and what of the data it needs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kfoc.blocks import DampedBlock, Damping
from kfoc.blocks.damped import DampedSpectrum
from kfoc.blocks.grouped import DampedGroups
from kfoc.curvature.damped import DampedCurvature
from kfoc.errors import naming
from kfoc.likelihoods.base import Likelihood, described
from kfoc.model.functional import Forward, concerning


@dataclass(frozen=True)
class DataFit:
    """How well the trained parameters fit the training data.

    Attributes:
        num_samples: of the data.
        num_labels: labels that count, or numbers in all targets of a regression.
        misfit: `-ln p(labels)`; for a regression half the sum of squared errors, by the variance of
            its likelihood's noise.
        constant: what `ln p` has besides: for a regression, of that noise.
    """

    num_samples: int
    num_labels: float
    misfit: float
    constant: float

    def check(self, expected: int) -> None:
        """Raise where it is not of so many samples, or not finite."""
        if not math.isfinite(self.misfit):
            raise ValueError(f"data: its misfit is not finite ({self.misfit})")
        if self.num_samples != expected:
            raise ValueError(
                f"the data have {self.num_samples} samples, but the posterior is one of "
                f"{expected}: pass the training data that the curvature was fitted on, or "
                f"Laplace(num_samples={self.num_samples}) where that was a part of it"
            )

    def log_likelihood(self, sigma_noise: Tensor) -> Tensor:
        """`ln p(targets)`, a scalar in float64."""
        misfit = torch.tensor(self.misfit, dtype=torch.float64)
        return self.constant - misfit / sigma_noise**2 - self.num_labels * sigma_noise.log()


def measured(forward: Forward, likelihood: Likelihood, data: Iterable[Any]) -> DataFit:
    """One pass over batches `(inputs, targets)` at the trained parameters.

    Raises:
        ValueError: no targets that do not fit, or a likelihood without `log_likelihood`.
    """
    samples, totals = 0, torch.zeros(3, dtype=torch.float64)
    for number, (inputs, targets) in enumerate(forward.batches(data)):
        with concerning(f"batch {number} of data"):
            outputs = forward.trained(forward.moved(inputs)).double()
            targets = forward.moved(targets)
            likelihood = likelihood.settled(outputs, targets)
            likelihood.check(outputs, targets, "empirical")
            found, misfit, labels = (
                of_samples(likelihood, name, outputs, targets)
                for name in ("log_likelihood", "misfit", "num_labels")
            )
        samples += len(outputs)
        totals += torch.stack([labels.sum(), misfit.sum(), (found + misfit).sum()]).cpu()
    if not samples:
        raise ValueError("data has no batches")
    labels, misfit, constant = totals.tolist()
    if not math.isfinite(misfit):
        raise ValueError(f"the model's fit to the data is not finite ({misfit})")
    return DataFit(samples, labels, misfit, constant)


def of_samples(likelihood: Likelihood, method: str, outputs: Tensor, targets: Any) -> Tensor:
    """What a method of a likelihood says of every sample, (N,).

    Raises:
        ValueError: it gives something else, as one of the user's own may.
    """
    found = getattr(likelihood, method)(outputs, targets)
    if not isinstance(found, Tensor) or found.shape != outputs.shape[:1]:
        raise ValueError(
            f"{method} of {type(likelihood).__name__} must give a number for each of "
            f"{len(outputs)} samples, found {described(found)}"
        )
    return found


def log_marginal_likelihood(
    log_likelihood: Tensor,
    posterior: DampedCurvature,
    squared_norms: Mapping[str, float],
    precisions: Mapping[str, Tensor],
    scale: Tensor,
) -> Tensor:
    """`ln p(targets | prior)` by Laplace's method, differentiable (MacKay 1992).

    Args:
        log_likelihood: of the targets at the trained parameters.
        posterior: factorised; its own damping and scale are of no account.
        squared_norms: layer name -> that of its trained parameters.
        precisions: layer name -> the prior's, in float64.
        scale: what the mean Fisher is multiplied by in the posterior's precision.
    """
    total = log_likelihood
    for layer, block in posterior.blocks.items():
        with naming(layer):
            total = total + layer_term(block, squared_norms[layer], precisions[layer], scale)
    return total


def layer_term(block: DampedBlock, squared_norm: float, precision: Tensor, scale: Tensor) -> Tensor:
    """`ln p(parameters)` plus half the log-volume of the posterior: one layer's share."""
    size = math.prod(block.shape)
    logdet = log_determinant(block, precision, scale)
    return 0.5 * (size * precision.log() - precision * squared_norm - logdet)


def log_determinant(block: DampedBlock, precision: Tensor, scale: Tensor) -> Tensor:
    """`ln det (scale * F + precision * I)`, in float64, from the factorisation that there is.

    Raises:
        ValueError: the matrix is not positive definite; or a derivative is asked for of a kind of
            block of the caller's own, which has no eigenvalues at hand.
    """
    if isinstance(block, DampedGroups):
        return torch.stack([log_determinant(b, precision, scale) for b in block.blocks]).sum()
    if isinstance(block, DampedSpectrum):
        values = block.spectrum.values.double() * scale + precision
        if (values <= 0).any():
            raise ValueError(
                f"the block is indefinite: with scale {scale.item():.6g} the prior precision must "
                f"exceed {(precision - values.min()).item():.3g}, found {precision.item():.3g}"
            )
        return values.log().sum().cpu()
    if precision.requires_grad or scale.requires_grad:
        raise ValueError(
            f"the log-determinant of a {type(block).__name__} of {math.prod(block.shape)} "
            "parameters has no derivative here: use Laplace.tuned, which needs none, or a "
            "curvature of KFOC() or EigenCorrected(KFOC())"
        )
    found = block.redamped(Damping(precision.item(), scale.item())).logdet()
    return torch.tensor(found, dtype=torch.float64)
