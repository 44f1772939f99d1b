"""How a layer's parameters lie in the matrix `[W | b]` that its block is about."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from kfoc.common.arguments import one_of

KINDS = ("rows", "columns", "transposed_convolution", "matrices", "stacked", "flat")


@dataclass(frozen=True)
class Layout:
    """The parameters of one layer as one matrix (o, i), and back.

    | kind | W | then |
    |---|---|---|
    | rows | the weight (o, ...), flattened behind its first dimension | the bias (o,), if any, as last column |
    | columns | the weight (i, o), transposed | likewise |
    | transposed_convolution | the weight (in, o / groups, *kernel): within each group, its first two dimensions swapped, then flattened | likewise |
    | matrices | the weight (groups, o / groups, i), one matrix above the other | |
    | stacked | every parameter, flattened to a column | |
    | flat | all parameters, flattened one after the other into a single column | |

    Attributes:
        names: of the parameters, as in `model.named_parameters()`.
        shapes: theirs, in the same order.
        kind: one of the above.
        groups: of a transposed convolution's channels.
    """  # noqa: E501

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    kind: str = "rows"
    groups: int = 1

    def __post_init__(self) -> None:
        one_of("layout", self.kind, KINDS)

    @property
    def shape(self) -> tuple[int, int]:
        """(o, i) of the matrix."""
        weight, bias = self.shapes[0], len(self.shapes) > 1
        if self.kind == "stacked":
            return math.prod(weight), len(self.shapes)
        if self.kind == "flat":
            return sum(math.prod(shape) for shape in self.shapes), 1
        if self.kind == "matrices":
            return weight[0] * weight[1], weight[2]
        if self.kind == "columns":
            return weight[1], weight[0] + bias
        if self.kind == "transposed_convolution":
            rest = math.prod(weight[2:]) * weight[0] // self.groups
            return weight[1] * self.groups, rest + bias
        return weight[0], math.prod(weight[1:]) + bias

    def join(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """The matrix, (..., o, i), from tensors by parameter name, each (..., *its shape).

        Raises:
            ValueError: a parameter that is missing, or a shape that does not fit.
        """
        parts = []
        for name, shape in zip(self.names, self.shapes, strict=True):
            if name not in tensors:
                raise ValueError(f"there is no tensor for the parameter {name!r}")
            tensor = tensors[name]
            if tuple(tensor.shape[tensor.ndim - len(shape) :]) != shape or tensor.ndim < len(shape):
                raise ValueError(
                    f"the tensor for the parameter {name!r} must end in its shape {shape}, found "
                    f"{tuple(tensor.shape)}"
                )
            parts.append(tensor.reshape((*tensor.shape[: tensor.ndim - len(shape)], *shape)))
        leading = {p.shape[: p.ndim - len(s)] for p, s in zip(parts, self.shapes, strict=True)}
        if len(leading) > 1:
            raise ValueError(
                f"the tensors for {', '.join(self.names)} have different leading dimensions: "
                f"{', '.join(str(tuple(shape)) for shape in leading)}"
            )
        lead = leading.pop()
        if self.kind == "stacked":
            return torch.stack([part.reshape(*lead, -1) for part in parts], -1)
        if self.kind == "flat":
            sizes = map(math.prod, self.shapes)  # not -1: there may be no vectors at all
            flat = [part.reshape(*lead, size) for part, size in zip(parts, sizes, strict=True)]
            return torch.cat(flat, -1)[..., None]
        columns = [self._weight_to_matrix(parts[0], lead)]
        columns += [part[..., None] for part in parts[1:]]
        return torch.cat(columns, -1) if len(columns) > 1 else columns[0]

    def split(self, matrix: Tensor) -> dict[str, Tensor]:
        """Tensors by parameter name, each (..., *its shape), from the matrix (..., o, i)."""
        lead = matrix.shape[:-2]
        if tuple(matrix.shape[-2:]) != self.shape:
            raise ValueError(
                f"the matrix of {', '.join(self.names)} must end in the shape {self.shape}, found "
                f"{tuple(matrix.shape)}"
            )
        if self.kind == "stacked":
            return {
                name: matrix[..., column].reshape((*lead, *shape))
                for column, (name, shape) in enumerate(zip(self.names, self.shapes, strict=True))
            }
        if self.kind == "flat":
            parts = matrix[..., 0].split([math.prod(shape) for shape in self.shapes], -1)
            return {
                name: part.reshape((*lead, *shape))
                for name, shape, part in zip(self.names, self.shapes, parts, strict=True)
            }
        bias = len(self.names) > 1
        weight = matrix[..., :-1] if bias else matrix
        found = {self.names[0]: self._matrix_to_weight(weight, lead)}
        if bias:
            found[self.names[1]] = matrix[..., -1].clone()
        return found

    def _weight_to_matrix(self, weight: Tensor, lead: torch.Size) -> Tensor:
        if self.kind == "matrices":
            return weight.flatten(-3, -2)
        if self.kind == "columns":
            return weight.mT
        if self.kind == "transposed_convolution":
            first, second, *kernel = self.shapes[0]
            grouped = weight.reshape(*lead, self.groups, first // self.groups, second, *kernel)
            axis = len(lead) + 1
            return grouped.transpose(axis, axis + 1).reshape(*lead, self.groups * second, -1)
        return weight.reshape(*lead, self.shapes[0][0], -1)

    def _matrix_to_weight(self, matrix: Tensor, lead: torch.Size) -> Tensor:
        if self.kind == "columns":
            return matrix.mT
        if self.kind == "transposed_convolution":
            first, second, *kernel = self.shapes[0]
            grouped = matrix.reshape(*lead, self.groups, second, first // self.groups, *kernel)
            axis = len(lead) + 1
            return grouped.transpose(axis, axis + 1).reshape(*lead, *self.shapes[0])
        return matrix.reshape(*lead, *self.shapes[0])


def covered(layouts: Mapping[str, Layout]) -> dict[str, tuple[int, ...]]:
    """The shapes of all parameters by name: layer by layer, each one's in its order."""
    return {
        name: shape
        for layout in layouts.values()
        for name, shape in zip(layout.names, layout.shapes, strict=True)
    }
