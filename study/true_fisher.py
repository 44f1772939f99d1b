"""The true Fisher of all parameters of a small network together, as a matrix."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

import kfoc
from networks import batches, sample_losses
from subjects import Data


class TrueFisher:
    """At the parameters that a model has.

    Attributes:
        start: (P,), these parameters.
        matrix: (P, P).
    """

    def __init__(self, model: nn.Module, data: Data) -> None:
        self.model, self._operator = model, kfoc.Fisher(model, batches(data, 50))
        parameters = dict(model.named_parameters())
        self.start = self._operator.flatten(
            {name: parameters[name].detach() for name in self._operator.parameters}
        )
        self.matrix = self._product(torch.eye(len(self.start)))

    def damped(self, damping: float) -> Tensor:
        return self.matrix + damping * torch.eye(len(self.matrix))

    def model_at(self, change: Tensor) -> Callable[[Tensor], Tensor]:
        """The model with its parameters changed by (P,)."""
        parameters = self._operator.unflatten(self.start + change)
        return lambda inputs: functional_call(self.model, parameters, (inputs,))

    def gradients(self, data: Data) -> Tensor:
        """(N, P), of each sample's own loss."""

        def loss(change: Tensor, inputs: Tensor, targets: Tensor) -> Tensor:
            return sample_losses(self.model_at(change), (inputs[None], targets[None])).sum()

        return vmap(grad(loss), (None, 0, 0))(torch.zeros_like(self.start), *data)

    def solve(self, rows: Tensor, damping: float, products: int) -> Tensor:
        """By conjugate gradients without a preconditioner, the rows together, as far as they go."""
        found = self._operator.solve(
            self._operator.unflatten(rows), damping, rtol=None, max_products=products
        )
        return self._operator.flatten(found.vector)

    def divided(self, damped: kfoc.DampedCurvature, rows: Tensor) -> Tensor:
        """The damped curvature's inverse times rows (k, P)."""
        return self._operator.flatten(damped.solve(self._operator.unflatten(rows)))

    def solutions(
        self, rows: Tensor, damping: float, prepare: Callable[[Tensor], Tensor], products: int
    ) -> Iterator[Tensor]:
        """By conjugate gradients, each row alone: what it is after 1, 2, ... products."""
        matrix, found, residual = self.damped(damping), torch.zeros_like(rows), rows
        direction, size = torch.zeros_like(rows), torch.ones(len(rows), 1)
        for _ in range(products):
            prepared = prepare(residual)
            before, size = size, (residual * prepared).sum(1, keepdim=True)
            direction = prepared + size / before * direction
            image = direction @ matrix
            step = size / (direction * image).sum(1, keepdim=True)
            found, residual = found + step * direction, residual - step * image
            yield found

    def _product(self, rows: Tensor) -> Any:
        return self._operator.flatten(self._operator.matvec(self._operator.unflatten(rows)))
