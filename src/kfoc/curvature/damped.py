"""A model's curvature with damping, factorised: what can be solved with and sampled from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kfoc.blocks import DampedBlock, Damping
from kfoc.common.ambient import Plain
from kfoc.common.arguments import whole
from kfoc.errors import by_layer
from kfoc.parameters.flat import flattened, scipy_operator, unflattened
from kfoc.parameters.layout import Layout
from kfoc.parameters.vectors import Operators, Places, Vector, applied, joined, quadratic

Dampings = float | Mapping[str, float]


def dampings(
    layers: tuple[str, ...], damping: Dampings, scale: float, method: str
) -> dict[str, Damping]:
    """One `Damping` per layer, from a number for all or one for each.

    Raises:
        ValueError: layers that are missing or unknown, or a number that makes no sense.
    """
    if isinstance(damping, Mapping):
        check_layers("damping", layers, damping)
        return {layer: Damping(damping[layer], scale, method) for layer in layers}
    return dict.fromkeys(layers, Damping(damping, scale, method))


def check_layers(what: str, layers: tuple[str, ...], given: Mapping[str, Any]) -> None:
    """Raises ValueError for layers that are missing among what is given for each, or unknown."""
    missing = [layer for layer in layers if layer not in given]
    unknown = [layer for layer in given if layer not in layers]
    if missing or unknown:
        raise ValueError(
            f"{what} by layer must have a number for each of {list(layers)}; missing: {missing}, "
            f"unknown: {unknown}"
        )


@dataclass(frozen=True, repr=False)
class DampedCurvature(Plain):
    """`B = scale * F + damping * I`, block by block; made by `Curvature.damped`.

    Vectors are dicts parameter name -> tensor, with any leading dimensions that all share. They
    are computed with as the blocks are, and come back in their own dtypes, on their own devices.

    Attributes:
        blocks: the factorised blocks by layer name.
        layouts: layer name -> the parameters of the block.
    """

    blocks: dict[str, DampedBlock]
    layouts: dict[str, Layout]

    def matvec(self, vector: Vector) -> dict[str, Tensor]:
        """`B v`."""
        return self._power(vector, 1)

    def solve(self, vector: Vector) -> dict[str, Tensor]:
        """`B^-1 v`."""
        return self._power(vector, -1)

    def sqrt_matvec(self, vector: Vector) -> dict[str, Tensor]:
        """`B^1/2 v`, with the symmetric root."""
        return self._power(vector, 0.5)

    def inverse_sqrt_matvec(self, vector: Vector) -> dict[str, Tensor]:
        """`B^-1/2 v`, with the symmetric root."""
        return self._power(vector, -0.5)

    def quadratic_form(self, vector: Vector) -> Tensor:
        """`v^T B v`, of the leading dimensions of v."""
        return self._quadratic(vector, 1)

    def inverse_quadratic_form(self, vector: Vector) -> Tensor:
        """`v^T B^-1 v`: with a stack of Jacobian rows, the variances of a linearised model."""
        return self._quadratic(vector, -1)

    def inverse_diagonal(self) -> dict[str, Tensor]:
        """The diagonal of `B^-1` by parameter name, in its shape: marginal variances of N(0, B^-1).

        Raises:
            ValueError: B is singular or indefinite; the message names the layer.
        """
        parts = by_layer(lambda _, block: block.inverse_diagonal(), self.blocks)
        return joined(parts, self.layouts)

    def logdet(self) -> float:
        """`ln det B`."""
        return sum(by_layer(lambda _, block: block.logdet(), self.blocks).values())

    def sample(
        self, num: int = 1, *, seed: int = 0, generator: torch.Generator | None = None
    ) -> dict[str, Tensor]:
        """Draws from N(0, B^-1), (num, *shape) by parameter name, in the blocks' dtype.

        Args:
            num: how many.
            seed: of the draws; the global random state is neither read nor changed.
            generator: in place of the seed, to go on from where the last call ended.
        """
        num = whole("num", num, 1)
        generator = torch.Generator().manual_seed(seed) if generator is None else generator
        place = generator.device

        def drawn(_: str, block: DampedBlock) -> Tensor:
            shape = num, *block.shape
            noise = torch.randn(shape, generator=generator, dtype=block.dtype, device=place)
            return block.draw(noise.to(block.device))

        return joined(by_layer(drawn, self.blocks), self.layouts)

    def redamped(
        self, damping: Dampings, *, method: str = "exact", scale: float = 1.0
    ) -> DampedCurvature:
        """The same F with another damping and scale, without another factorisation."""
        chosen = dampings(tuple(self.blocks), damping, scale, method)
        blocks = {layer: block.redamped(chosen[layer]) for layer, block in self.blocks.items()}
        return DampedCurvature(blocks, self.layouts)

    def flatten(self, vector: Vector) -> Tensor:
        """One vector (..., P) from a dict, in the order of `Curvature.flatten`."""
        return flattened(vector, self.layouts)

    def unflatten(self, vector: Tensor) -> dict[str, Tensor]:
        """The dict of a vector (..., P): the inverse of `flatten`."""
        return unflattened(vector, self.layouts)

    def to_linear_operator(self, exponent: float = -1) -> Any:
        """`B^exponent` as a `scipy.sparse.linalg.LinearOperator` over vectors as `flatten` gives.

        Args:
            exponent: -1, the inverse, as a preconditioner (`M` of `scipy.sparse.linalg.cg`) is
                one; or 1, 1/2, -1/2.

        Raises:
            ValueError: another exponent.
            ImportError: without SciPy.
        """
        if exponent not in (1, 0.5, -0.5, -1):
            raise ValueError(f"exponent must be one of 1, 0.5, -0.5, -1, found {exponent}")
        power = partial(self._power, exponent=exponent)
        return scipy_operator(power, self.layouts, self._places)

    def __repr__(self) -> str:
        return f"DampedCurvature of {len(self.blocks)} layers: {', '.join(self.blocks)}"

    def _power(self, vector: Vector, exponent: float) -> dict[str, Tensor]:
        return applied(vector, self.layouts, self._operators(exponent), self._places)

    def _quadratic(self, vector: Vector, exponent: float) -> Tensor:
        return quadratic(vector, self.layouts, self._operators(exponent), self._places)

    def _operators(self, exponent: float) -> Operators:
        return {k: partial(block.power, exponent=exponent) for k, block in self.blocks.items()}

    @property
    def _places(self) -> Places:
        return {layer: (block.device, block.dtype) for layer, block in self.blocks.items()}
