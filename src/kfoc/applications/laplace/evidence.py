"""The log marginal likelihood of the Laplace approximation, and what of the data it needs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from kfoc.blocks import DampedBlock, Damping
from kfoc.blocks.damped import DampedSpectrum
from kfoc.blocks.grouped import DampedGroups
from kfoc.curvature.damped import DampedCurvature
from kfoc.errors import naming
from kfoc.likelihoods.base import Likelihood
from kfoc.likelihoods.bernoulli import Bernoulli
from kfoc.likelihoods.categorical import Categorical
from kfoc.likelihoods.gaussian import Gaussian
from kfoc.model.functional import Forward, batches, concerning


@dataclass(frozen=True)
class DataFit:
    """How well the trained parameters fit the training data.

    Attributes:
        num_samples: of the data.
        num_labels: labels that count, or numbers in all targets of a regression.
        misfit: `-ln p(labels)`; for a regression half the sum of squared errors.
    """

    num_samples: int
    num_labels: int
    misfit: float

    def log_likelihood(self, likelihood: Likelihood, sigma_noise: Tensor) -> Tensor:
        """`ln p(targets)`, a scalar in float64."""
        misfit = torch.tensor(self.misfit, dtype=torch.float64)
        if not isinstance(likelihood, Gaussian):
            return -misfit
        constant = 0.5 * self.num_labels * math.log(2 * math.pi)
        return -misfit / sigma_noise**2 - self.num_labels * sigma_noise.log() - constant


def measured(forward: Forward, likelihood: Likelihood, data: Iterable[Any]) -> DataFit:
    """One pass over batches `(inputs, targets)` at the trained parameters.

    Raises:
        ValueError: no batches, targets that do not fit, or a likelihood of the user's own.
    """
    samples, labels, total = 0, 0, 0.0
    for number, (inputs, targets) in enumerate(batches(data)):
        with concerning(f"batch {number} of data"):
            outputs = forward.trained(forward.moved(inputs))
            targets = forward.moved(targets)
            likelihood = likelihood.settled(outputs, targets)
            counted, misfit = misfit_of(likelihood, outputs, targets)
        samples, labels, total = samples + len(outputs), labels + counted, total + misfit
    if not samples:
        raise ValueError("data has no batches")
    if not math.isfinite(total):
        raise ValueError(f"the model's fit to the data is not finite ({total})")
    return DataFit(samples, labels, total)


def misfit_of(likelihood: Likelihood, outputs: Tensor, targets: Any) -> tuple[int, float]:
    """How many labels count in a batch, and their misfit as in `DataFit`."""
    likelihood.check(outputs, targets, "empirical")
    outputs = outputs.double()
    if isinstance(likelihood, Gaussian):
        return targets.numel(), 0.5 * (outputs - targets.double()).square().sum().item()
    if isinstance(likelihood, Bernoulli):
        loss = functional.binary_cross_entropy_with_logits(
            outputs, targets.double(), reduction="sum"
        )
        return targets.numel(), loss.item()
    if isinstance(likelihood, Categorical):
        logits = outputs.movedim(class_dimension(likelihood, outputs, targets), -1)
        labels, ignored = targets.flatten().long(), likelihood.ignore_index
        loss = functional.cross_entropy(
            logits.reshape(-1, logits.shape[-1]), labels, ignore_index=ignored, reduction="sum"
        )
        return int((labels != ignored).sum()), loss.item()
    raise ValueError(
        f"the log-likelihood of {type(likelihood).__name__} is not known: the likelihood must be "
        "categorical, gaussian or bernoulli"
    )


def class_dimension(likelihood: Categorical, outputs: Tensor, labels: Tensor | None = None) -> int:
    """Where the classes are, as `Categorical` has it; `labels` have passed its check."""
    if likelihood.class_dim is not None:
        return likelihood.class_dim % outputs.ndim
    last = outputs.ndim - 1
    if labels is None:
        return last if outputs.ndim <= 3 else 1
    return last if labels.shape == outputs.shape[:-1] else 1


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
