"""Influence of training samples on predictions, by solves with a curvature."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kfoc.common.ambient import plainly
from kfoc.common.arguments import whole
from kfoc.curvature.curvature import Curvature
from kfoc.curvature.damped import Dampings
from kfoc.fisher.fisher import Fisher
from kfoc.likelihoods.base import Likelihood
from kfoc.likelihoods.named import resolved
from kfoc.model.batches import Predict, empty
from kfoc.model.functional import Forward, concerning, count_samples, sliced
from kfoc.model.sample_gradients import chunks, gradients
from kfoc.parameters.layout import covered


@dataclass(frozen=True)
class Ranking:
    """The samples that come first for each query.

    Attributes:
        indices: (Q, k), positions in the training data, in the order that it was read.
        scores: (Q, k), theirs.
    """

    indices: Tensor
    scores: Tensor


@dataclass(frozen=True)
class Influence:
    """Scores of training samples for queries, see `influence`.

    Attributes:
        helpful: the lowest scores, lowest first: more weight on them lowers the query's loss.
        harmful: the highest, highest first.
        num_samples: of the training data.
        scores: all of them, (Q, num_samples); None where only the first were kept.
        residual: (Q,), how far the queries' solves are from those with the true Fisher, see
            `Fisher.solve`; None without `products`.
    """

    helpful: Ranking
    harmful: Ranking
    num_samples: int
    scores: Tensor | None = None
    residual: Tensor | None = None


@plainly
def influence(
    model: nn.Module,
    curvature: Curvature,
    data: Iterable[tuple[Any, Any]],
    query: tuple[Any, Any],
    likelihood: str | Likelihood = "categorical",
    *,
    damping: Dampings = 1e-3,
    products: int = 0,
    top: int | None = 10,
    predict: Predict | None = None,
    chunk_size: int | None = None,
) -> Influence:
    """Which training samples matter for which predictions (Koh & Liang 2017).

    The score of training sample n for query q is

        -grad_q^T (F + damping * I)^-1 grad_n

    with gradients of each sample's own negative log-likelihood by the curvature's parameters: the
    derivative of the query's loss by n's weight in the training loss, a mean over samples plus
    `damping / 2 * |parameters|^2`. So the damping to use is the weight decay of that mean loss, and
    leaving n out changes the query's loss by about `-score / num_samples`. A negative score is a
    sample that helps.

    F is the curvature; with `products`, the true Fisher of its parameters, all layers together, of
    which the curvature is the preconditioner (`Fisher.solve`): a few give nearly the scores of the
    exact solve.

    The model is read at its trained parameters, in eval mode, and not changed. The training data
    is read once, in order, and once more for each product; only the first scores are kept.

    Args:
        data: the training data, batches `(inputs, targets)`; inputs as `fit` takes them, with the
            samples in the first dimension of all tensors.
        query: a batch `(inputs, targets)` of Q samples.
        likelihood: that of the training loss.
        damping: a positive number, or, without products, one for each layer by name.
        products: with the true Fisher, at most so many for all queries together.
        top: how many of the most helpful and harmful to keep per query; None: all, and `scores`.
        predict: `(model, inputs) -> outputs`, for models that return more than a tensor.
        chunk_size: samples whose gradients are held at once; None: as 128 MiB allow.

    Raises:
        ValueError: bad arguments, targets that do not fit the likelihood, no samples, or values
            that are not finite; the message names the argument and the batch.
    """
    top = None if top is None else whole("top", top, 1)
    products = whole("products", products, 0)
    run = _Run.of(model, curvature, likelihood, predict, chunk_size)
    with concerning("query"):
        found, residual = run.query_gradients(query), None
    if products:
        if isinstance(damping, Mapping):
            raise ValueError("damping must be one number for all layers with products")
        fisher = Fisher(model, data, likelihood, layers=curvature, predict=predict)
        solution = fisher.solve(
            found, damping, preconditioner=curvature, rtol=None, max_products=products
        )
        solved, residual = solution.vector, solution.residual
    else:
        solved = curvature.damped(damping).solve(found)
    kept = _Kept(top)
    for rows in run.over(data):
        kept.add(-sum_of_products(solved, rows))
    return kept.finished(residual)


@plainly
def self_influence(
    model: nn.Module,
    curvature: Curvature,
    data: Iterable[tuple[Any, Any]],
    likelihood: str | Likelihood = "categorical",
    *,
    damping: Dampings = 1e-3,
    predict: Predict | None = None,
    chunk_size: int | None = None,
) -> Tensor:
    """How much each training sample matters for its own loss: (N,), in one pass over the data.

        grad_n^T (F + damping * I)^-1 grad_n

    with gradients of the sample's negative log-likelihood: minus its own score in `influence`, and
    never negative. Leaving n out raises its own loss by about a share of `1 / num_samples` of it.
    What the model knows of a sample from that sample alone has much of it: rare and mislabelled
    samples come first (Koh & Liang 2017, section 5.4).

    Args:
        data: batches `(inputs, targets)` of the training data, as of `influence`.
        likelihood: that of the training loss.
        damping: a positive number, or one for each layer by name.
        predict: `(model, inputs) -> outputs`, for models that return more than a tensor.
        chunk_size: samples whose gradients are held at once; None: as 128 MiB allow.

    Raises:
        ValueError: bad arguments or data, as of `influence`.
    """
    run = _Run.of(model, curvature, likelihood, predict, chunk_size)
    damped = curvature.damped(damping)
    found = [damped.inverse_quadratic_form(rows) for rows in run.over(data)]
    if not found:
        raise ValueError("data has no samples")
    return torch.cat(found)


@dataclass
class _Run:
    forward: Forward
    parameters: dict[str, Tensor]
    likelihood: Likelihood
    chunk_size: int | None

    @classmethod
    def of(
        cls,
        model: nn.Module,
        curvature: Curvature,
        likelihood: str | Likelihood,
        predict: Predict | None,
        chunk_size: int | None,
    ) -> _Run:
        forward = Forward(model, predict)
        forward.check_deterministic()
        parameters = forward.parameters(covered(curvature.layouts))
        return cls(forward, parameters, resolved(likelihood), chunk_size)

    def over(self, data: Iterable[Any]) -> Iterator[dict[str, Tensor]]:
        """Chunks of all samples' gradients."""
        for number, (inputs, targets) in enumerate(self.forward.batches(data)):
            with concerning(f"batch {number} of data"):
                yield from self.sample_gradients(inputs, targets)

    def sample_gradients(self, inputs: Any, targets: Any) -> Iterable[dict[str, Tensor]]:
        """Chunks of the samples' gradients of `ln p(target)`, name -> (n, *shape)."""
        inputs, targets = self.forward.moved(inputs), self.forward.moved(targets)
        count = count_samples(inputs)
        outputs = self.forward.trained(inputs)
        self.likelihood = self.likelihood.settled(outputs, targets)
        (cotangents,) = self.likelihood.cotangents(outputs, targets, "empirical", 1, 0, 0)
        self.forward.check_separate(inputs)
        numbers = sum(value.numel() for value in self.parameters.values())
        for part in chunks(count, numbers, self.chunk_size):
            chosen = sliced(inputs, part)
            yield gradients(self.forward, self.parameters, chosen, cotangents[part])

    def query_gradients(self, query: Any) -> dict[str, Tensor]:
        """Name -> (Q, *shape)."""
        if empty(query):
            raise ValueError("the query has no samples")
        ((inputs, targets),) = self.forward.batches([query])
        parts = list(self.sample_gradients(inputs, targets))
        return {name: torch.cat([part[name] for part in parts]) for name in self.parameters}


class _Kept:
    """The first scores so far."""

    def __init__(self, top: int | None) -> None:
        self.top = top
        self.count = 0
        self.indices: Tensor | None = None
        self.scores: Tensor | None = None

    def add(self, scores: Tensor) -> None:
        """Take in scores (Q, n) of the next n samples."""
        indices = torch.arange(self.count, self.count + scores.shape[1], device=scores.device)
        indices = indices.expand_as(scores)
        self.count += scores.shape[1]
        if self.scores is not None and self.indices is not None:
            scores = torch.cat([self.scores, scores], 1)
            indices = torch.cat([self.indices, indices], 1)
        if self.top is not None and scores.shape[1] > 2 * self.top:
            order = scores.argsort(dim=1, stable=True)
            ends = torch.cat([order[:, : self.top], order[:, -self.top :]], 1)
            scores, indices = scores.gather(1, ends), indices.gather(1, ends)
        self.scores, self.indices = scores, indices

    def finished(self, residual: Tensor | None) -> Influence:
        if self.scores is None or self.indices is None:
            raise ValueError("data has no samples")
        order = self.scores.argsort(dim=1, stable=True)
        size = order.shape[1] if self.top is None else self.top
        helpful, harmful = order[:, :size], order.flip(1)[:, :size]
        first, last = (
            Ranking(self.indices.gather(1, part), self.scores.gather(1, part))
            for part in (helpful, harmful)
        )
        scores = self.scores if self.top is None else None
        return Influence(first, last, self.count, scores, residual)


def sum_of_products(first: dict[str, Tensor], second: dict[str, Tensor]) -> Tensor:
    """Inner products (Q, n) of vectors name -> (Q, *shape) and (n, *shape)."""
    parts = [first[name].flatten(1) @ second[name].flatten(1).mT for name in first]
    return torch.stack(parts).sum(0)
