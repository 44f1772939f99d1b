"""Vectors over a model's parameters: dicts of tensors by name, and their matrices by layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from kfoc.layout import Layout

Vector = Mapping[str, Tensor]


def matrices(vector: Vector, layouts: Mapping[str, Layout]) -> dict[str, Tensor]:
    """The matrices (..., o, i) by layer of a vector, or of a stack of them.

    Args:
        vector: parameter name -> tensor (..., *the parameter's shape), with the same leading
            dimensions for all, of exactly the parameters of `layouts`.

    Raises:
        ValueError: parameters that are missing or not covered, or shapes that do not fit.
    """
    covered = [name for layout in layouts.values() for name in layout.names]
    missing = [name for name in covered if name not in vector]
    extra = sorted(vector.keys() - set(covered))
    if missing or extra:
        problems = [f"lacks {', '.join(missing)}"] if missing else []
        problems += [f"has {', '.join(extra)} besides"] if extra else []
        raise ValueError(
            f"the vector must have exactly the parameters that the curvature covers "
            f"(curvature.parameters); it {' and '.join(problems)}"
        )
    found = {layer: layout.join(vector) for layer, layout in layouts.items()}
    leading = {tuple(matrix.shape[:-2]) for matrix in found.values()}
    if len(leading) > 1:
        raise ValueError(
            f"the tensors of a vector must share their leading dimensions, found "
            f"{', '.join(str(shape) for shape in sorted(leading))}"
        )
    return found


def joined(parts: Mapping[str, Tensor], layouts: Mapping[str, Layout]) -> dict[str, Tensor]:
    """Tensors by parameter name, from matrices by layer."""
    found: dict[str, Tensor] = {}
    for layer, matrix in parts.items():
        found |= layouts[layer].split(matrix)
    return found


Operators = Mapping[str, Callable[[Tensor], Tensor]]


def applied(
    vector: Vector,
    layouts: Mapping[str, Layout],
    operators: Operators,
    dtypes: Mapping[str, torch.dtype],
) -> dict[str, Tensor]:
    """Each layer's operator on its part; computed in `dtypes`, returned in the vector's."""
    parts = {}
    for layer, matrix in matrices(vector, layouts).items():
        with naming(layer):
            parts[layer] = operators[layer](matrix.to(dtypes[layer])).to(matrix.dtype)
    return joined(parts, layouts)


def quadratic(
    vector: Vector,
    layouts: Mapping[str, Layout],
    operators: Operators,
    dtypes: Mapping[str, torch.dtype],
) -> Tensor:
    """The sum over layers of `<v, operator(v)>`, of the vector's leading dimensions."""
    terms = []
    for layer, matrix in matrices(vector, layouts).items():
        with naming(layer):
            part = matrix.to(dtypes[layer])
            terms.append((operators[layer](part) * part).sum((-2, -1)).to(matrix.dtype))
    return torch.stack(terms).sum(0)


@contextmanager
def naming(layer: str) -> Iterator[None]:
    """Put the layer's name in front of errors."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"layer {layer!r}: {error}") from error
