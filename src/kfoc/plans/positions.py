"""Several positions per sample: a matrix over its positions stands for a factor."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kfoc.linalg.products import add_symmetric, halves, mirrored, share, times_half
from kfoc.nearest.contraction import Side, opposite, positive
from kfoc.plans.base import Coefficients, Formed, Scratch, change
from kfoc.plans.cost import Cost, Size, positioned
from kfoc.samples.linear import Samples

# Columns of a matrix product that is one of many: fewer would run at a lower rate.
COLUMNS = 256

# Blocks of inner products that one matrix product of many takes: numbers in all.
BLOCKS = 2**17


class Positions(Coefficients):
    """`left = sum G^T W_n G` and `right = sum A^T V_n A`, iterated on W and V, (N, T, T) each.

    `W_n = A_n right A_n^T` and `V_n = sum_s G_sn left G_sn^T` are PSD with the factors.
    """

    plan = "positions"

    def __init__(self, samples: Samples, memory_limit: int = 0) -> None:
        super().__init__(samples, memory_limit)
        count = samples.num_samples
        self._rows = {
            "left": samples.grads,  # (S, N, T, o)
            "right": samples.inputs.rows(0, count)[None],
        }
        self._scratch = Scratch()

    @staticmethod
    def fits(z: Size) -> bool:
        return z.T != 1  # or there are cheaper ones

    @staticmethod
    def cost(z: Size) -> Cost:
        setup = z.N * z.T**2 * z.i
        return Cost(setup, positioned(z), positioned(z), z.N * z.T * (z.i + 2 * z.T))

    @property
    def like(self) -> Tensor:
        """For dtype and device."""
        return self._rows["left"]

    def width(self, side: Side) -> int:
        """The size of a factor."""
        return self._rows[side].shape[-1]

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

    def apply_rows(self, rows: Tensor, side: Side) -> Tensor:
        """As `apply`, from the factor `rows^T rows`, which is of low rank; rows of (r, n)."""
        image: Tensor | None = None
        for direction in self._rows[side]:
            few = direction @ rows.mT
            image = torch.bmm(few, few.mT) if image is None else image.baddbmm_(few, few.mT)
        assert image is not None
        return image

    def times_factor(self, representation: Tensor, side: Side, matrix: Tensor) -> Tensor:
        """A represented factor times a matrix of few columns, (n, k); the factor is not formed."""
        parts = [
            direction.flatten(0, 1).mT @ torch.bmm(representation, direction @ matrix).flatten(0, 1)
            for direction in self._rows[side]
        ]
        return sum(parts[1:], parts[0])

    def carried(self, matrices: Tensor, side: Side) -> Tensor:
        """Every `X` times matrices that stand on its right, or `X^T` times those on its left.

        Args:
            matrices: (n, k), or (S N, n, k) with one for each X.

        Returns:
            (S N, i or o, k).
        """
        here, there = self._rows[side], self._rows[opposite(side)]
        if matrices.ndim == 3:
            matrices = matrices.view(-1, here.shape[1], *matrices.shape[1:])
        return torch.matmul(there.mT, here @ matrices).flatten(0, 1)

    def changed(self, first: Formed, second: Tensor, scale: float, probes: Tensor) -> Tensor:
        """`probes^T (scale * half step from second - first) probes`, (m, m), probes of (n, m)."""
        return change(self.carried(probes, first.side), first, second, scale, probes)

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

    def __init__(self, samples: Samples, memory_limit: int = 0) -> None:
        super().__init__(samples, memory_limit)
        self._kernels: dict[Side, Tensor] = {}

    @staticmethod
    def cost(z: Size) -> Cost:
        setup: float = z.N * z.T**2 * z.i
        steps, memory = 0.0, z.N * z.T * (z.i + 2 * z.T)
        for directions, size in ((1, z.i), (z.S, z.o)):
            if through_products(directions, z.N, z.T, size):
                setup += of_pairs(directions * z.N, z.T, size)
                memory += (directions * z.N * z.T) ** 2
                steps += by_products(directions, z.N, z.T)
            else:
                steps += by_factor(directions, z.N, z.T, size)
        return Cost(setup, steps / 2, positioned(z), memory)

    @property
    def certifies(self) -> bool:
        return all(through_products(*rows.shape) for rows in self._rows.values())

    def forget(self) -> None:
        super().forget()
        self._kernels.clear()

    def _whole(self, side: Side) -> Tensor:
        """(M, M, T, T): block (n, m) holds the products of m's positions (rows) with n's."""
        if side not in self._kernels:
            self._kernels[side] = _position_products(self._rows[side].flatten(0, 1))
        return self._kernels[side]

    def _image(self, representation: Tensor, side: Side) -> Tensor:
        directions, samples, positions, size = self._rows[side].shape
        if not through_products(directions, samples, positions, size):
            return super()._image(representation, side)
        kernel = self._whole(side)
        count, parts = len(kernel), []
        # W K by blocks, the samples that it is summed over below one another: the second product
        # of a sample is then a single one. Small blocks are taken several samples at a time.
        several = max(1, BLOCKS // (count * positions**2))
        weights = representation.repeat(directions, 1, 1) if directions > 1 else representation
        for start in range(0, count, several):
            blocks = kernel[start : start + several]  # (n, M, T_m, T_n)
            step = torch.matmul(weights, blocks).flatten(1, 2)
            parts.append(torch.bmm(step.mT, blocks.flatten(1, 2)))
        image = torch.cat(parts) if len(parts) > 1 else parts[0]
        return image.view(-1, samples, *image.shape[1:]).sum(0) if directions > 1 else image

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
