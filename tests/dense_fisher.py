"""The Fisher of all of a model's parameters as a dense matrix, row by row; none of it is kfoc's."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import jacrev
from torch.nn import functional
from torch.utils._pytree import tree_map


def loss(likelihood: str, outputs: Tensor, target: Tensor) -> Tensor:
    """`-ln p(target)` of one sample with outputs (K,), up to what does not depend on them."""
    if likelihood == "categorical":
        return functional.cross_entropy(outputs, target)
    if likelihood == "gaussian":
        return 0.5 * (outputs - target).square().sum()
    return functional.binary_cross_entropy_with_logits(outputs, target, reduction="sum")


def jacobian(outputs: Tensor, parameters: list[Tensor]) -> Tensor:
    """Of outputs (K,) by the parameters: (K, P), a backward pass for each."""
    rows = [torch.autograd.grad(each, parameters, retain_graph=True) for each in outputs]
    return torch.stack([torch.cat([part.flatten() for part in row]) for row in rows])


def dense(
    model: nn.Module,
    data: Iterable[tuple[Any, Tensor]],
    likelihood: str,
    fisher: str = "exact",
    names: Iterable[str] | None = None,
    called: Callable[[nn.Module, Any], Tensor] = lambda model, inputs: model(inputs),
) -> Tensor:
    """The mean over samples, (P, P), in the order of `names`; None: all, in the model's order.

    Outputs are (N, K).
    """
    names = [name for name, _ in model.named_parameters()] if names is None else list(names)
    parameters: list[Tensor] = [model.get_parameter(name) for name in names]
    total, count = torch.zeros(()), 0
    for inputs, targets in data:
        for n, target in enumerate(targets):
            (outputs,) = called(model, tree_map(lambda t, n=n: t[n : n + 1], inputs))
            J, at = jacobian(outputs, parameters), outputs.detach()
            gradient = jacrev(lambda z, y=target: loss(likelihood, z, y))
            # Of these three likelihoods the Hessian is the expectation over the labels.
            g = gradient(at)
            by_outputs = jacrev(gradient)(at) if fisher == "exact" else g[:, None] * g
            total, count = total + J.mT @ by_outputs @ J, count + 1
    return total / count
