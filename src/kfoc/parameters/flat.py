"""A curvature as a SciPy linear operator over one vector of all its parameters."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from kfoc.parameters.layout import Layout, covered
from kfoc.parameters.vectors import Places, Vector, matrices


def flattened(vector: Vector, layouts: Mapping[str, Layout]) -> Tensor:
    """One vector (..., P), from tensors (..., *shape) by parameter name.

    The order is that of the layers, and within a layer that of its parameters, each row-major:
    where all of a model's parameters are covered, as in `parameters_to_vector(model.parameters())`.

    Raises:
        ValueError: parameters that are missing or not covered, or shapes that do not fit.
    """
    parts = matrices(vector, layouts)  # for its checks
    lead = next(iter(parts.values())).shape[:-2] if parts else ()
    flat = [vector[name].reshape(*lead, math.prod(s)) for name, s in covered(layouts).items()]
    return torch.cat(flat, -1)


def unflattened(vector: Tensor, layouts: Mapping[str, Layout]) -> dict[str, Tensor]:
    """The inverse of `flattened`.

    Raises:
        ValueError: a vector of another length.
    """
    shapes = covered(layouts)
    sizes = [math.prod(shape) for shape in shapes.values()]
    if not vector.ndim or vector.shape[-1] != sum(sizes):
        raise ValueError(
            f"the vector must end in the {sum(sizes)} parameters that are covered, found "
            f"the shape {tuple(vector.shape)}"
        )
    parts = zip(shapes.items(), vector.split(sizes, -1), strict=True)
    return {name: part.reshape(*vector.shape[:-1], *shape) for (name, shape), part in parts}


def scipy_operator(
    apply: Callable[[Vector], dict[str, Tensor]],
    layouts: Mapping[str, Layout],
    places: Places,
) -> Any:
    """A `scipy.sparse.linalg.LinearOperator`, (P, P), of a symmetric operator on dicts.

    Args:
        apply: takes and gives tensors (k, *shape) by parameter name.
        layouts: the parameters and their order (see `flattened`).
        places: of the blocks: the operator works on the device of the first, in the widest of
            their dtypes, and float32 at least.

    Raises:
        ImportError: without SciPy.
    """
    try:
        from scipy.sparse.linalg import LinearOperator
    except ImportError as error:
        raise ImportError("a linear operator of SciPy needs it: pip install scipy") from error
    device, _ = next(iter(places.values()))
    dtype = reduce(torch.promote_types, (each for _, each in places.values()), torch.float32)
    size = sum(map(math.prod, covered(layouts).values()))

    def columns(array: Any) -> Any:
        """The operator on the columns of an array (P, k)."""
        if array.dtype.kind == "c":
            raise ValueError("the operator is real: apply it to real and imaginary part in turn")
        # A copy: torch can neither share memory that is read-only, nor with negative strides.
        rows = torch.tensor(array.T.copy())
        vectors = unflattened(rows.to(device, dtype), layouts)
        return flattened(apply(vectors), layouts).detach().cpu().numpy().T

    def column(array: Any) -> Any:
        return columns(array.reshape(-1, 1))[:, 0]

    return LinearOperator(
        shape=(size, size),
        dtype=torch.empty(0, dtype=dtype).numpy().dtype,
        matvec=column,
        rmatvec=column,
        matmat=columns,
        rmatmat=columns,
    )
