"""The inverse of a damped curvature, made for steps of an optimizer: cheap to form, only to solve.

`Curvature.damped` takes eigendecompositions, which serve every power, damping and log-determinant.
An optimizer solves alone, and forms the inverse anew every few steps: for factored damping the
inverses of the two damped factors, by Cholesky, cost a third of that (1024 rows, one core), and
solve with two products of matrices where an eigenbasis takes four.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kfoc.blocks import Block, DampedBlock, Damping, GroupedBlock, KroneckerBlock
from kfoc.blocks.cholesky import damped_factors, triangle
from kfoc.blocks.grouped import by_parts
from kfoc.curvature.curvature import Curvature
from kfoc.curvature.damped import Dampings, dampings
from kfoc.errors import by_layer, naming
from kfoc.parameters.layout import Layout
from kfoc.parameters.vectors import Vector


@dataclass(frozen=True)
class FactoredInverse:
    """`kron(left, right)` of inverses (o, o) and (i, i), or (n,) for diagonal ones."""

    left: Tensor
    right: Tensor

    def solve(self, matrix: Tensor) -> Tensor:
        """The inverse times a matrix (o, i), computed in the inverse's dtype."""
        wide = matrix.to(self.left.dtype)
        wide = self.left @ wide if self.left.ndim == 2 else self.left[:, None] * wide
        wide = wide @ self.right if self.right.ndim == 2 else wide * self.right
        return wide.to(matrix.dtype)


@dataclass(frozen=True)
class GroupedInverse:
    """An inverse for each group of outputs."""

    parts: tuple[Inverse, ...]
    sizes: tuple[int, ...]

    def solve(self, matrix: Tensor) -> Tensor:
        return by_parts([part.solve for part in self.parts], list(self.sizes), matrix)


@dataclass(frozen=True)
class DampedInverse:
    """That of a block which `Block.damped` has factorised."""

    block: DampedBlock

    def solve(self, matrix: Tensor) -> Tensor:
        return self.block.power(matrix.to(self.block.dtype), -1).to(matrix.dtype)


Inverse = FactoredInverse | GroupedInverse | DampedInverse


@dataclass(frozen=True)
class Preconditioner:
    """`(scale * F + damping * I)^-1`, layer by layer.

    Attributes:
        inverses: by layer name.
        layouts: layer name -> the parameters that its block is about.
    """

    inverses: dict[str, Inverse]
    layouts: dict[str, Layout]

    @staticmethod
    def of(
        curvature: Curvature, damping: Dampings, *, method: str = "pi", scale: float = 1.0
    ) -> Preconditioner:
        """The inverse that `curvature.damped(damping, method=..., scale=...)` would solve with.

        Raises:
            ValueError: bad arguments, or a block that cannot be inverted; it names the layer.
        """
        chosen = dampings(curvature.layers, damping, scale, method)
        inverses = by_layer(lambda layer, block: _inverse(block, chosen[layer]), curvature)
        return Preconditioner(inverses, curvature.layouts)

    def solve(self, gradients: Vector) -> dict[str, Tensor]:
        """The inverse times those layers' gradients of which every parameter is given, by name."""
        found: dict[str, Tensor] = {}
        for layer, layout in self.layouts.items():
            if all(name in gradients for name in layout.names):
                with naming(layer):
                    found |= layout.split(self.inverses[layer].solve(layout.join(gradients)))
        return found


def _inverse(block: Block, damping: Damping) -> Inverse:
    if isinstance(block, GroupedBlock):
        parts = tuple(_inverse(part, damping) for part in block.blocks)
        return GroupedInverse(parts, tuple(block.sizes))
    if isinstance(block, KroneckerBlock) and damping.damping > 0:
        factored = _of_factors(block, damping)
        if factored is not None:
            return factored
    # Exact damping of a product has no factors, and rounding can spoil a Cholesky decomposition:
    # then the eigendecomposition, which also says what is wrong with the block.
    return DampedInverse(block.damped(damping))


def _of_factors(block: KroneckerBlock, damping: Damping) -> FactoredInverse | None:
    """None where the damped block is no product, or Cholesky fails."""
    damped = damped_factors(block.left, block.right, damping)
    if damped is None:
        return None
    left, right = map(_inverted, damped)
    return None if left is None or right is None else FactoredInverse(left, right)


def _inverted(factor: Tensor) -> Tensor | None:
    """Its inverse, or None where it is not positive definite."""
    if factor.ndim == 1:
        return factor.reciprocal() if bool((factor > 0).all()) else None
    found = triangle(factor)
    inverse = None if found is None else torch.cholesky_inverse(found)
    return inverse if inverse is not None and inverse.isfinite().all() else None
