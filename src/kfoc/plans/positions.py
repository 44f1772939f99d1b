"""Several positions per sample: a matrix over its positions stands for a factor."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kfoc.kronecker import Side, positive
from kfoc.plans.coefficients import Coefficients, Scratch
from kfoc.products import add_symmetric, halves, mirrored, share, times_half
from kfoc.samples import Samples

# Columns of a matrix product that is one of many: fewer would run at a lower rate.
COLUMNS = 256


class Positions(Coefficients):
    """`left = sum G^T W_n G` and `right = sum A^T V_n A`, iterated on W and V, (N, T, T) each.

    `W_n = A_n right A_n^T` and `V_n = sum_s G_sn left G_sn^T` are PSD with the factors.
    """

    plan = "positions"

    def __init__(self, samples: Samples) -> None:
        super().__init__()
        count = samples.num_samples
        self._rows = {
            "left": samples.grads,  # (S, N, T, o)
            "right": samples.inputs.rows(0, count)[None],
        }
        self._scratch = Scratch()

    def start(self) -> Tensor:
        rows = self._rows["right"][0]
        return torch.bmm(rows, rows.mT).div_(math.sqrt(rows.shape[2]))

    def apply(self, matrix: Tensor, side: Side) -> Tensor:
        rows = self._rows[side]
        diagonal = halves(matrix)
        image: Tensor | None = None
        for direction in rows:
            flat = direction.reshape(-1, direction.shape[-1])
            half_way = times_half(flat, matrix, diagonal, self._scratch.like(flat))
            product = torch.bmm(half_way.view_as(direction), direction.mT)
            image = product if image is None else image.add_(product)
        assert image is not None
        return image + image.mT

    def factor(self, representation: Tensor, side: Side) -> Tensor:
        size = self._rows[side].shape[-1]
        total = representation.new_empty(size, size)
        self._add(total, representation, side, 1.0, 0.0)
        return mirrored(total)

    def accumulate(self, total: Tensor, representation: Tensor, side: Side, scale: float) -> None:
        self._add(total, representation, side, scale, 1.0)

    def _add(
        self, total: Tensor, representation: Tensor, side: Side, alpha: float, beta: float
    ) -> None:
        size = total.shape[0]
        for direction in self._rows[side]:
            weighted = torch.bmm(representation, direction, out=self._scratch.like(direction))
            rows = direction.reshape(-1, size)
            add_symmetric(total, rows, weighted.view(-1, size), alpha=alpha, beta=beta)
            beta = 1.0

    def positive(self, representation: Tensor, side: Side) -> bool:
        # Enough, and cheap; but not necessary.
        return positive(representation) or super().positive(representation, side)

    def _products(self) -> Tensor:
        """Inner products of the per-sample gradients, (S N, S N)."""
        left, right = self._rows["left"].flatten(0, 1), self._rows["right"][0]
        count, total = len(left), len(left) // len(right)
        products = left.new_empty(count, count)
        for k in range(count):
            first = torch.matmul(left[k], left.mT)  # (S N, T, T)
            second = torch.matmul(right[k % len(right)], right.mT).repeat(total, 1, 1)
            products[k] = (first * second).sum((1, 2))
        return products

    def squared_norm(self) -> float:
        return self._products().square_().sum(dtype=torch.float64).item()


def through_products(S: int, N: int, T: int, size: int) -> bool:
    """Whether a half step is cheaper by inner products of positions than by the factor."""
    return by_products(S, N, T) < by_factor(S, N, T, size)


def by_products(S: int, N: int, T: int) -> float:
    """Multiply-adds of a half step by inner products."""
    return 2 * S**2 * N**2 * T**3


def by_factor(S: int, N: int, T: int, size: int) -> float:
    """Multiply-adds of a half step by a factor: of forming it and of applying it."""
    return 2 * S * N * (T**2 * size + T * share(size) * size**2)


class PositionGram(Positions):
    """The half steps go through all inner products between positions, (N T, N T) matrices.

    `V_n = sum_m K_nm W_m K_nm^T` with the (T, T) blocks of the gradients' products, and likewise
    for W with those of the inputs: the sizes of the layer enter once, when those are formed. A
    side whose factor is small goes through the factor all the same.
    """

    plan = "position_gram"

    def __init__(self, samples: Samples) -> None:
        super().__init__(samples)
        self._kernels: dict[Side, Tensor] = {}

    @property
    def certifies(self) -> bool:
        return all(through_products(*rows.shape) for rows in self._rows.values())

    def forget(self) -> None:
        super().forget()
        self._kernels.clear()

    def _whole(self, side: Side) -> Tensor:
        """(M, M, T, T): block (m, n) holds the products of n's positions (rows) with m's."""
        if side not in self._kernels:
            self._kernels[side] = _position_products(self._rows[side].flatten(0, 1))
        return self._kernels[side]

    def _image(self, representation: Tensor, side: Side) -> Tensor:
        directions, samples, positions, size = self._rows[side].shape
        if not through_products(directions, samples, positions, size):
            return super()._image(representation, side)
        kernel = self._whole(side)
        count, samples = len(kernel), len(representation)
        image: Tensor | None = None
        for m in range(count):
            block = kernel[m]  # (M, T_n, T_m)
            step = torch.matmul(block, representation[m % samples])
            if image is None:
                image = torch.bmm(step, block.mT)
            else:
                image.baddbmm_(step, block.mT)
        assert image is not None
        return image.view(-1, samples, *image.shape[1:]).sum(0)

    def _products(self) -> Tensor:
        left, right = self._whole("left"), self._whole("right")
        repeats = len(left) // len(right)
        products = [
            (left[m] * right[m % len(right)].repeat(repeats, 1, 1)).sum((1, 2))
            for m in range(len(left))
        ]
        return torch.stack(products)


def _position_products(rows: Tensor) -> Tensor:
    """All products of the positions of rows (M, T, size), as blocks (M, M, T, T).

    A few m at a time, with the n up to them: the other half are transposes.
    """
    count, positions, size = rows.shape
    products = rows.new_empty(count, count, positions, positions)
    for start, stop in _few(count, positions):
        few = rows[start:stop].reshape(-1, size)
        block = (rows[:stop].reshape(-1, size) @ few.mT).view(stop, positions, -1, positions)
        products[start:stop, :stop] = block.permute(2, 0, 1, 3)
        products[:start, start:stop] = products[start:stop, :start].transpose(0, 1).mT
    return products


def _few(count: int, positions: int) -> list[tuple[int, int]]:
    step = max(1, COLUMNS // positions)
    return [(start, min(start + step, count)) for start in range(0, count, step)]


def of_pairs(count: int, positions: int, size: int) -> float:
    """Multiply-adds of the products between all positions of `count` samples and directions."""
    pairs = sum((stop - start) * stop for start, stop in _few(count, positions))
    return pairs * positions**2 * size
