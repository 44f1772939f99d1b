"""The true Fisher of all parameters of a small network together, as a matrix."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jacrev, vmap

import kfoc
from kfoc.linalg.conjugate_gradients import conjugate_gradients
from kfoc.parameters.vectors import Vector
from networks import batches, sample_losses
from subjects import Data

AT_ONCE = 10  # samples whose derivatives of all outputs are held


class TrueFisher:
    """Of the labels that a model expects, at the parameters that it has.

    Attributes:
        start: (P,), these parameters.
        matrix: (P, P).
    """

    def __init__(self, model: nn.Module, data: Data) -> None:
        self.model = model
        self._shapes = {name: p.shape for name, p in model.named_parameters()}
        self.start = self.flat(dict(model.named_parameters())).detach()
        self.matrix = torch.zeros(len(self.start), len(self.start))
        outputs = vmap(jacrev(self._outputs), (None, 0))
        for inputs, _ in batches(data, AT_ONCE):
            with torch.no_grad():
                p = model(inputs).softmax(-1)
                jacobian = outputs(torch.zeros_like(self.start), inputs)  # (n, *p.shape[1:], P)
            p = p[..., None]
            # sum_c p_c (J_c - mean) (J_c - mean)^T = J^T (diag(p) - p p^T) J
            rows = p.sqrt() * (jacobian - (p * jacobian).sum(-2, keepdim=True))
            rows = rows.flatten(0, -2)
            self.matrix.addmm_(rows.mT, rows, alpha=1 / len(data[0]))

    def damped(self, damping: float) -> Tensor:
        return self.matrix + damping * torch.eye(len(self.matrix))

    def model_at(self, change: Tensor) -> Callable[[Tensor], Tensor]:
        """The model with its parameters changed by (P,)."""
        parameters = self.unflat(self.start + change)
        return lambda inputs: functional_call(self.model, parameters, (inputs,))

    def gradients(self, data: Data) -> Tensor:
        """(N, P), of each sample's own loss."""

        def loss(change: Tensor, inputs: Tensor, targets: Tensor) -> Tensor:
            return sample_losses(self.model_at(change), (inputs[None], targets[None])).sum()

        return vmap(grad(loss), (None, 0, 0))(torch.zeros_like(self.start), *data)

    def divided(self, damped: kfoc.DampedCurvature, rows: Tensor) -> Tensor:
        """The damped curvature's inverse times rows (k, P)."""
        return self.flat(damped.solve(self.unflat(rows)))

    def together(
        self, rows: Tensor, damping: float, prepare: Callable[[Tensor], Tensor], products: int
    ) -> Tensor:
        """By conjugate gradients as `kfoc.Fisher.solve` does: the rows share their directions."""
        matrix = self.damped(damping)
        return conjugate_gradients(
            lambda directions: directions @ matrix, rows, prepare, rtol=0.0, max_products=products
        ).solutions

    def alone(
        self, rows: Tensor, damping: float, prepare: Callable[[Tensor], Tensor], products: int
    ) -> Iterator[Tensor]:
        """By conjugate gradients, each row by itself: what it is after 1, 2, ... products."""
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

    def flat(self, vector: Vector) -> Tensor:
        """(..., P) from a dict, whose tensors may have leading dimensions."""
        return torch.cat([vector[k].flatten(-len(s)) for k, s in self._shapes.items()], -1)

    def unflat(self, rows: Tensor) -> dict[str, Tensor]:
        parts = rows.split([shape.numel() for shape in self._shapes.values()], -1)
        return {
            name: part.unflatten(-1, shape)
            for (name, shape), part in zip(self._shapes.items(), parts, strict=True)
        }

    def _outputs(self, change: Tensor, inputs: Tensor) -> Tensor:
        return self.model_at(change)(inputs[None])[0]
