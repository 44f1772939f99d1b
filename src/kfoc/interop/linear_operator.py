"""Blocks as operators of the linear_operator package, GPyTorch's."""

from __future__ import annotations

from collections.abc import Mapping
from functools import singledispatch
from typing import Any

import torch
from torch import Tensor

from kfoc.blocks import (
    Block,
    DenseBlock,
    DiagonalBlock,
    EigenBlock,
    GroupedBlock,
    KroneckerBlock,
    LowRankBlock,
)
from kfoc.curvature.curvature import Curvature
from kfoc.errors import by_layer
from kfoc.parameters.vectors import Vector, joined, matrices

try:
    from linear_operator import operators
except ImportError as error:
    raise ImportError(
        f"kfoc.interop.linear_operator needs linear_operator ({error}): pip install linear_operator"
    ) from error


def to_linear_operators(curvature: Curvature) -> dict[str, Any]:
    """Layer name -> a lazy `linear_operator.LinearOperator` of its block, (o * i, o * i).

    It acts on the rows of `[W | b]` one after the other: `layer_vectors` gives them. Kronecker
    products become `KroneckerProductLinearOperator`, with its exact solves once a diagonal is
    added: `operator.add_diagonal(torch.tensor(1e-3)).solve(vector)`.

    Raises:
        ValueError: a kind of block that has no counterpart.
    """
    return by_layer(lambda _, block: to_linear_operator(block), curvature)


@singledispatch
def to_linear_operator(block: Block) -> Any:
    """A block as the operator that has its structure."""
    raise ValueError(
        f"there is no linear operator for a {type(block).__name__}; its to_dense() is a matrix"
    )


def layer_vectors(curvature: Curvature, vector: Vector) -> dict[str, Tensor]:
    """Layer name -> (..., o * i), from tensors (..., *shape) by parameter name."""
    parts = matrices(vector, curvature.layouts)
    return {layer: matrix.flatten(-2) for layer, matrix in parts.items()}


def parameter_tensors(curvature: Curvature, vectors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `layer_vectors`, of the layers given."""
    parts = {
        layer: vector.unflatten(-1, curvature.layouts[layer].shape)
        for layer, vector in vectors.items()
    }
    return joined(parts, curvature.layouts)


@to_linear_operator.register
def _kronecker(block: KroneckerBlock) -> Any:
    diagonal = block.right.ndim == 1
    right = operators.DiagLinearOperator(block.right) if diagonal else block.right
    return operators.KroneckerProductLinearOperator(block.left, right)


@to_linear_operator.register
def _dense(block: DenseBlock) -> Any:
    return operators.DenseLinearOperator(block.matrix)


@to_linear_operator.register
def _diagonal(block: DiagonalBlock) -> Any:
    return operators.DiagLinearOperator(block.diagonal.flatten())


@to_linear_operator.register
def _grouped(block: GroupedBlock) -> Any:
    products = [each for each in block.blocks if isinstance(each, KroneckerBlock)]
    if len(products) < len(block.blocks) or len({each.shape for each in products}) > 1:
        raise ValueError("only groups with Kronecker products of one shape have a linear operator")
    lefts = torch.stack([each.left for each in products])
    rights = torch.stack([each.right for each in products])
    product = operators.KroneckerProductLinearOperator(lefts, rights)
    return operators.BlockDiagLinearOperator(product)


@to_linear_operator.register
def _eigen(block: EigenBlock) -> Any:
    basis = operators.KroneckerProductLinearOperator(block.left_vectors, block.right_vectors)
    roots = operators.DiagLinearOperator(block.eigenvalues.flatten().clamp_min(0).sqrt())
    return operators.RootLinearOperator(operators.MatmulLinearOperator(basis, roots))


@to_linear_operator.register
def _low_rank(block: LowRankBlock) -> Any:
    terms = zip(block.lefts, block.rights, strict=True)
    products = [operators.KroneckerProductLinearOperator(*term) for term in terms]
    return operators.SumLinearOperator(*products)
