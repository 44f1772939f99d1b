"""Conjugate gradients and Lanczos for symmetric operators on stacks of matrices (k, o, i)."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

Operator = Callable[[Tensor], Tensor]

INDEFINITE = (
    "the damped block is not positive definite: a sum of Kronecker products can be indefinite. "
    "Raise the damping"
)
MAX_STEPS = 1000
LANCZOS_STEPS = 300
# Of the log-determinant: its standard error falls with the root of the first.
PROBES = 32
QUADRATURE_STEPS = 40


def tolerance(dtype: torch.dtype) -> float:
    """The relative residual at which iterations stop."""
    return torch.finfo(dtype).eps ** 0.75


def conjugate_gradients(operator: Operator, preconditioner: Operator, vectors: Tensor) -> Tensor:
    """Solutions x, (k, o, i), of `operator(x) = vectors`.

    Raises:
        ValueError: a direction in which the operator is not positive was met, or the residual did
            not fall under the tolerance in `MAX_STEPS` steps.
    """
    solution, residual = torch.zeros_like(vectors), vectors.clone()
    goal = tolerance(vectors.dtype) * _norms(vectors)
    conditioned = preconditioner(residual)
    direction, power = conditioned, _dots(residual, conditioned)
    for _ in range(MAX_STEPS):
        active = _norms(residual) > goal
        if not active.any():
            return solution
        image = operator(direction)
        curvature = _dots(direction, image)
        if (curvature[active] <= 0).any():
            raise ValueError(INDEFINITE)
        # Solved ones stay as they are: going on would divide zero by zero.
        step = torch.where(active, power / torch.where(active, curvature, 1.0), 0.0)
        solution = solution + step[:, None, None] * direction
        residual = residual - step[:, None, None] * image
        conditioned = preconditioner(residual)
        after = _dots(residual, conditioned)
        ratio = torch.where(active, after / torch.where(power > 0, power, 1.0), 0.0)
        direction, power = conditioned + ratio[:, None, None] * direction, after
    smallest = torch.finfo(vectors.dtype).tiny
    worst = (_norms(residual) / _norms(vectors).clamp_min(smallest)).max().item()
    raise ValueError(
        f"conjugate gradients left a relative residual of {worst:.1e} after {MAX_STEPS} steps: "
        "raise the damping, or use float64"
    )


def matrix_power(operator: Operator, vectors: Tensor, exponent: float) -> Tensor:
    """`operator^exponent` times vectors (k, o, i), by Lanczos with full reorthogonalisation.

    Raises:
        ValueError: the operator is not positive definite on the Krylov space, or the result did
            not settle in `LANCZOS_STEPS` steps.
    """
    return torch.stack([_power_of_one(operator, vector, exponent) for vector in vectors])


def _power_of_one(operator: Operator, vector: Tensor, exponent: float) -> Tensor:
    norm = vector.norm()
    if not norm:
        return torch.zeros_like(vector)
    lanczos = _Lanczos(operator, vector / norm)
    before: Tensor | None = None
    while True:
        exhausted = lanczos.extend(10)
        nodes, first = lanczos.quadrature()
        weights = lanczos.ritz @ (nodes**exponent * first)
        result = (weights @ torch.stack(lanczos.vectors[: len(weights)]).flatten(1)).view_as(vector)
        if exhausted:
            return result * norm
        if before is not None:
            change = (result - before).norm()
            if change <= tolerance(vector.dtype) * result.norm():
                return result * norm
            if len(weights) >= LANCZOS_STEPS:
                raise ValueError(
                    f"Lanczos did not settle in {LANCZOS_STEPS} steps (last relative change "
                    f"{(change / result.norm()).item():.1e}): raise the damping, or use float64"
                )
        before = result


def logdet(operator: Operator, shape: tuple[int, int], like: Tensor) -> float:
    """`ln det operator`, estimated from `PROBES` fixed random signs (stochastic Lanczos)."""
    generator = torch.Generator().manual_seed(0)
    signs = torch.randint(0, 2, (PROBES, *shape), generator=generator) * 2 - 1
    size, total = math.prod(shape), 0.0
    for sign in signs.to(like):
        lanczos = _Lanczos(operator, sign / math.sqrt(size))
        lanczos.extend(QUADRATURE_STEPS)
        nodes, first = lanczos.quadrature()
        total += (first.double().square() @ nodes.double().log()).item() * size
    return total / PROBES


class _Lanczos:
    """The Krylov space of one start vector (o, i) of unit norm."""

    def __init__(self, operator: Operator, start: Tensor) -> None:
        self.operator = operator
        self.vectors = [start]
        self.alphas: list[float] = []
        self.betas: list[float] = []
        self.ritz = start.new_zeros(0, 0)

    def extend(self, steps: int) -> bool:
        """Take more steps; True where the space is exhausted, and functions of it are exact."""
        for _ in range(steps):
            current = self.vectors[-1]
            image = self.operator(current[None])[0]
            alpha = (image * current).sum()
            basis = torch.stack(self.vectors).flatten(1)
            for _ in range(2):  # once leaves the rounding of the first in
                image = image - ((basis @ image.flatten()) @ basis).view_as(image)
            beta = image.norm()
            self.alphas.append(alpha.item())
            scale = max(abs(a) for a in self.alphas)
            full = len(self.vectors) >= current.numel()
            if full or beta <= 8 * torch.finfo(image.dtype).eps * scale:
                return True
            self.betas.append(beta.item())
            self.vectors.append(image / beta)
        return False

    def quadrature(self) -> tuple[Tensor, Tensor]:
        """Ritz values, and the first entries of their vectors in the Krylov basis."""
        count = len(self.alphas)
        like = self.vectors[0]
        off = torch.tensor(self.betas[: count - 1], dtype=torch.float64)
        matrix = torch.diag(torch.tensor(self.alphas, dtype=torch.float64))
        matrix = matrix + torch.diag(off, 1) + torch.diag(off, -1)
        nodes, self.ritz = (t.to(like) for t in torch.linalg.eigh(matrix))
        if nodes[0] <= 0:
            raise ValueError(INDEFINITE)
        return nodes, self.ritz[0]


def _dots(first: Tensor, second: Tensor) -> Tensor:
    return (first * second).sum((-2, -1))


def _norms(vectors: Tensor) -> Tensor:
    return vectors.flatten(1).norm(dim=1)
