"""The dense reference: per-sample gradients by torch.func, F formed, rearranged, and its SVD.

Nothing here uses kfoc: it is what kfoc is held against.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev, vmap

Cotangents = Callable[[Tensor, Tensor], Tensor]


def fisher_block(
    model: nn.Module,
    layer: str,
    inputs: Tensor,
    cotangents: Tensor,
    *,
    bias: bool | None = None,
) -> Tensor:
    """Exact block of `layer`, (o * i, o * i), from cotangents (S, N, *output shape)."""
    gradients = sample_gradients(model, layer, inputs, cotangents, bias=bias)
    rows = gradients.flatten(0, 1).flatten(1)
    return rows.mT @ rows / len(inputs)


def sample_gradients(
    model: nn.Module, layer: str, inputs: Tensor, cotangents: Tensor, *, bias: bool | None = None
) -> Tensor:
    """Per-sample gradients of the extended weight [W | b], (S, N, o, i)."""
    module = model.get_submodule(layer)
    names = ["weight"]
    if bias is None:
        bias = getattr(module, "bias", None) is not None
    if bias:
        names.append("bias")
    prefix = f"{layer}." if layer else ""
    constants = {k: v.detach() for k, v in model.state_dict().items()}
    chosen = {prefix + name: constants.pop(prefix + name) for name in names}

    def outputs(parameters: dict[str, Tensor], sample: Tensor) -> Tensor:
        return functional_call(model, {**constants, **parameters}, (sample[None],))[0]

    jacobians = vmap(jacrev(outputs), in_dims=(None, 0))(chosen, inputs)
    dims = cotangents.ndim - 2
    parts = []
    for name in names:
        jacobian = jacobians[prefix + name]  # (N, *output, *parameter)
        flat = jacobian.flatten(1, dims).reshape(len(inputs), -1, *chosen[prefix + name].shape)
        gradient = torch.einsum("snc,nc...->sn...", cotangents.flatten(2), flat)
        is_weight = name == "weight"
        parts.append(rows_of_outputs(module, gradient) if is_weight else gradient[..., None])
    return torch.cat(parts, -1)


def elementwise_gradients(
    model: nn.Module, layer: str, inputs: Tensor, cotangents: Tensor
) -> Tensor:
    """Per-sample gradients of a normalisation layer's scale and shift, (S, N, features, 2)."""
    constants = {k: v.detach() for k, v in model.state_dict().items()}
    names = [f"{layer}.{name}" for name, _ in model.get_submodule(layer).named_parameters()]
    chosen = {name: constants.pop(name) for name in names}

    def outputs(parameters: dict[str, Tensor], sample: Tensor) -> Tensor:
        return functional_call(model, {**constants, **parameters}, (sample[None],))[0]

    jacobians = vmap(jacrev(outputs), in_dims=(None, 0))(chosen, inputs)
    flat = [jacobians[name].reshape(len(inputs), cotangents[0, 0].numel(), -1) for name in names]
    return torch.stack([torch.einsum("snc,ncf->snf", cotangents.flatten(2), j) for j in flat], -1)


def gradients_alone(
    model: nn.Module, names: Sequence[str], inputs: Sequence[Tensor], cotangents: Tensor
) -> list[Tensor]:
    """Per-sample gradients by parameters, (S, N, *shape) each: every sample run by itself.

    Args:
        inputs: the model's arguments, samples first.
        cotangents: (S, N, *output shape).
    """
    parameters = [model.get_parameter(name) for name in names]
    found = []
    for n in range(cotangents.shape[1]):
        output = model(*(x[n : n + 1] for x in inputs))
        for s in range(len(cotangents)):
            found.append(
                torch.autograd.grad(
                    output, parameters, cotangents[s, n : n + 1], True, materialize_grads=True
                )
            )
    shape = cotangents.shape[1], len(cotangents)
    return [torch.stack(g).unflatten(0, shape).transpose(0, 1) for g in zip(*found, strict=True)]


def fisher_of(gradients: list[Tensor], kind: str) -> Tensor:
    """F of a block from its parameters' gradients, in any kind of layout but a transposed one."""
    if kind in ("rows", "columns"):
        weight = gradients[0].mT if kind == "columns" else gradients[0].flatten(3)
        columns = [weight, *(g[..., None] for g in gradients[1:])]
        matrix = torch.cat(columns, -1)
    else:
        flat = [g.reshape(*g.shape[:2], -1) for g in gradients]
        matrix = torch.stack(flat, -1) if kind == "stacked" else torch.cat(flat, -1)
    rows = matrix.flatten(0, 1).flatten(1)
    return rows.mT @ rows / gradients[0].shape[1]


def rows_of_outputs(module: nn.Module, gradient: Tensor) -> Tensor:
    """Gradients by a weight, (S, N, *weight), as matrices with a row per output: (S, N, o, i)."""
    if not isinstance(module, nn.modules.conv._ConvTransposeNd):
        return gradient.flatten(3)
    groups = module.groups
    split = gradient.flatten(4).unflatten(2, (groups, module.in_channels // groups))
    return split.transpose(3, 4).flatten(4).flatten(2, 3)


def rearranged(fisher: Tensor, o: int, i: int) -> Tensor:
    """F as the matrix sum_k vec(L_k) vec(R_k)^T, (o * o, i * i) (Lemma 3.1)."""
    return fisher.reshape(o, i, o, i).permute(0, 2, 1, 3).reshape(o * o, i * i)


def optimum(fisher: Tensor, o: int, i: int) -> tuple[Tensor, float, float]:
    """The closest Kronecker product (dense), its norm, and the relative error, by the SVD."""
    u, s, v = torch.linalg.svd(rearranged(fisher, o, i), full_matrices=False)
    left, right = u[:, 0].reshape(o, o), v[0].reshape(i, i)
    best = s[0] * torch.kron(left, right)
    error = s[1:].norm() / s.norm() if s.norm() > 0 else torch.tensor(0.0)
    return best, s[0].item(), error.item()


def relative_error(fisher: Tensor, approximation: Tensor) -> float:
    return ((fisher - approximation).norm() / fisher.norm()).item()


def categorical_exact(outputs: Tensor) -> Tensor:
    """sqrt(p_c) (e_c - p) for logits (N, C): (C, N, C)."""
    p = outputs.softmax(-1)
    eye = torch.eye(p.shape[-1])
    return torch.stack([p[:, c : c + 1].sqrt() * (eye[c] - p) for c in range(p.shape[-1])])


def categorical_observed(outputs: Tensor, labels: Tensor) -> Tensor:
    """d log p(y) by logits (N, C), from autograd of the log-likelihood: (1, N, C)."""
    leaf = outputs.detach().requires_grad_()
    log_p = torch.log_softmax(leaf, -1).gather(-1, labels[:, None]).sum()
    return torch.autograd.grad(log_p, leaf)[0][None]


def gaussian_exact(outputs: Tensor) -> Tensor:
    count = math.prod(outputs.shape[1:])
    return (
        torch.eye(count)
        .reshape(count, 1, *outputs.shape[1:])
        .expand(-1, len(outputs), *[-1] * (outputs.ndim - 1))
    )


def bernoulli_exact(outputs: Tensor) -> Tensor:
    p = outputs.sigmoid()
    return gaussian_exact(outputs) * (p * (1 - p)).sqrt()


def assert_psd_and_symmetric(factor: Tensor) -> None:
    assert torch.equal(factor, factor.mT)
    values = torch.linalg.eigvalsh(factor.double())
    assert values[0] >= -32 * torch.finfo(factor.dtype).eps * max(values[-1].item(), 0.0)
