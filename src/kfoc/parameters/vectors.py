"""Vectors over a model's parameters: dicts of tensors by name, and their matrices by layer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import reduce

import torch
from torch import Tensor

from kfoc.errors import by_layer, naming
from kfoc.parameters.layout import Layout, covered

Vector = Mapping[str, Tensor]


def matrices(vector: Vector, layouts: Mapping[str, Layout]) -> dict[str, Tensor]:
    """The matrices (..., o, i) by layer of a vector, or of a stack of them.

    Args:
        vector: parameter name -> tensor (..., *the parameter's shape), with the same leading
            dimensions for all, of exactly the parameters of `layouts`.

    Raises:
        ValueError: parameters that are missing or not covered, shapes that do not fit, or numbers
            that are not real and floating-point.
    """
    names = covered(layouts)
    missing = [name for name in names if name not in vector]
    extra = sorted(vector.keys() - names.keys())
    if missing or extra:
        problems = [f"lacks {', '.join(missing)}"] if missing else []
        problems += [f"has {', '.join(extra)} besides"] if extra else []
        raise ValueError(
            f"the vector must have exactly the parameters that are covered (see `parameters`); it "
            f"{' and '.join(problems)}"
        )
    for name in names:
        kind = getattr(vector[name], "dtype", None) or type(vector[name]).__name__
        if not isinstance(vector[name], Tensor) or not vector[name].is_floating_point():
            raise ValueError(
                f"the vector must have a real floating-point tensor for the parameter {name!r}, "
                f"found {kind}"
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


Places = Mapping[str, tuple[torch.device, torch.dtype]]  # of the blocks, by layer


def applied(
    vector: Vector,
    layouts: Mapping[str, Layout],
    operators: Operators,
    places: Places,
) -> dict[str, Tensor]:
    """Each layer's operator on its part; computed at `places`, returned as each tensor came."""

    def result(layer: str, matrix: Tensor) -> Tensor:
        return operators[layer](matrix.to(*places[layer]))

    parts = by_layer(result, matrices(vector, layouts))
    return {name: part.to(vector[name]) for name, part in joined(parts, layouts).items()}


def quadratic(
    vector: Vector,
    layouts: Mapping[str, Layout],
    operators: Operators,
    places: Places,
) -> Tensor:
    """The sum over layers of `<v, operator(v)>`, of the vector's leading dimensions.

    On the vector's device and in the widest of its dtypes, float32 at least.
    """
    terms = []
    dtype = reduce(torch.promote_types, (v.dtype for v in vector.values()), torch.float32)
    device = next(iter(vector.values())).device
    for layer, matrix in matrices(vector, layouts).items():
        with naming(layer):
            part = matrix.to(*places[layer])
            terms.append((operators[layer](part) * part).sum((-2, -1)).to(device, dtype))
    return torch.stack(terms).sum(0)
