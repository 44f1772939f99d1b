"""Gradients and Jacobians of single samples: vectorised, or one by one where that cannot be."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.func import grad, jacrev, vmap

from kfoc.common.arguments import whole
from kfoc.linalg.scaling import wide
from kfoc.model.batches import mapped
from kfoc.model.functional import Forward, count_samples, sliced

Parameters = Mapping[str, Tensor]
# Numbers that one chunk of gradients may take: 128 MiB in float32.
CHUNK_NUMBERS = 2**25
ALL = slice(None)


def jacobians(
    forward: Forward, parameters: Parameters, inputs: Any, part: slice = ALL
) -> dict[str, Tensor]:
    """The derivative of each sample's outputs by some parameters.

    Args:
        parameters: name -> trained value.
        inputs: of N samples with K outputs each, in all their dimensions.
        part: the outputs to take; all of them.

    Returns:
        name -> (N, K, *the parameter's shape), in float32 at least.
    """

    def outputs(parameters: Parameters, sample: Any) -> Tensor:
        return _of_one(forward, parameters, sample).flatten()[part]

    def vectorised() -> dict[str, Tensor]:
        return vmap(jacrev(outputs), in_dims=(None, 0))(dict(parameters), inputs)

    def one(leaves: Parameters, number: int) -> dict[str, Tensor]:
        found = outputs(leaves, sliced(inputs, number))
        rows = [_gradient(output, leaves) for output in found]
        return {name: torch.stack([row[name] for row in rows]) for name in leaves}

    with forward.kept():
        return _either(vectorised, one, parameters, count_samples(inputs))


def gradients(
    forward: Forward, parameters: Parameters, inputs: Any, cotangents: Tensor
) -> dict[str, Tensor]:
    """The gradient of `<cotangents[n], outputs[n]>` for each sample n.

    Args:
        cotangents: of the shape (N, ...) of the outputs.

    Returns:
        name -> (N, *the parameter's shape), in float32 at least.
    """

    def inner(parameters: Parameters, sample: Any, cotangent: Tensor) -> Tensor:
        return (_of_one(forward, parameters, sample) * cotangent).sum()

    def vectorised() -> dict[str, Tensor]:
        return vmap(grad(inner), in_dims=(None, 0, 0))(dict(parameters), inputs, cotangents)

    def one(leaves: Parameters, number: int) -> dict[str, Tensor]:
        sample = sliced(inputs, number)
        return _gradient(inner(leaves, sample, cotangents[number]), leaves)

    with forward.kept():
        return _either(vectorised, one, parameters, count_samples(inputs))


def chunks(count: int, numbers: int, size: int | None) -> Iterator[slice]:
    """Slices of `count` samples of so many numbers each, `size` at a time, or as memory allows.

    Raises:
        ValueError: a size under 1.
    """
    size = None if size is None else whole("chunk_size", size, 1)
    step = size or max(1, CHUNK_NUMBERS // max(numbers, 1))
    return (slice(start, start + step) for start in range(0, count, step))


def _of_one(forward: Forward, parameters: Parameters, sample: Any) -> Tensor:
    outputs = forward.transformed(mapped(sample, lambda t: t[None]), parameters)
    if not outputs.ndim or len(outputs) != 1:
        raise ValueError(
            f"one sample gave outputs of the shape {tuple(outputs.shape)}: the first dimension "
            "must be the samples"
        )
    return outputs[0]


def _either(
    vectorised: Callable[[], dict[str, Tensor]],
    one: Callable[[Parameters, int], dict[str, Tensor]],
    parameters: Parameters,
    count: int,
) -> dict[str, Tensor]:
    """Vectorised; or sample by sample, for models that `torch.func.vmap` cannot run.

    Such are models whose control flow depends on values. An error of the model's own comes back
    from the second way.
    """
    try:
        with torch.no_grad():  # torch.func differentiates all the same; nothing else needs to
            found = {name: wide(rows) for name, rows in vectorised().items()}
    except (RuntimeError, ValueError):
        pass
    else:
        return _finite(found)
    with torch.enable_grad():
        leaves = {name: p.detach().clone().requires_grad_() for name, p in parameters.items()}
        rows = [one(leaves, number) for number in range(count)]
    return _finite({name: wide(torch.stack([row[name] for row in rows])) for name in parameters})


def _finite(derivatives: dict[str, Tensor]) -> dict[str, Tensor]:
    for name, values in derivatives.items():
        if not values.isfinite().all():
            raise ValueError(f"the derivatives by {name!r} have values that are not finite")
    return derivatives


def _gradient(value: Tensor, leaves: Parameters) -> dict[str, Tensor]:
    if not value.requires_grad:
        return {name: torch.zeros_like(leaf) for name, leaf in leaves.items()}
    found = torch.autograd.grad(
        value, [*leaves.values()], retain_graph=True, allow_unused=True, materialize_grads=True
    )
    return dict(zip(leaves, found, strict=True))
