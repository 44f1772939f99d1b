"""One position per sample: a weight per sample stands for a factor."""

from __future__ import annotations

import math
from copy import copy

import torch
from torch import Tensor

from kfoc.linalg.products import (
    add_symmetric,
    gram,
    halves,
    mirrored,
    orthonormal,
    share,
    times_half,
)
from kfoc.nearest.contraction import Side, opposite
from kfoc.plans.base import CHUNK, Coefficients, Formed, Scratch
from kfoc.plans.cost import Cost, Size, factors
from kfoc.samples.inputs import Inputs, Rows
from kfoc.samples.linear import Samples

# The share of some samples' squares that a projection must have, and by how many it is judged.
CAPTURED = 0.5
FEW = 256

# Samples by which it is judged whether a half step would change anything.
SOME = 512


class Primal(Coefficients):
    """T = 1: `left = sum_n w_n sum_s g g^T` and `right = sum_n v_n a a^T`, iterated on w and v.

    The weights are `w_n = a^T right a` and `v_n = sum_s g^T left g`: never negative, so the
    factors are PSD by construction.
    """

    plan = "primal"
    single = True

    def __init__(self, samples: Samples, memory_limit: int = 0) -> None:
        super().__init__(samples, memory_limit)
        self._count = samples.num_samples
        right, constant = single_rows(samples.inputs)
        self._vectors = {"left": samples.grads[:, :, 0].flatten(0, 1), "right": right}
        self._constants: dict[Side, float | None] = {"left": None, "right": constant}
        self._sizes = dict(zip(("left", "right"), samples.shape, strict=True))
        self._scratch = Scratch()

    @staticmethod
    def fits(z: Size) -> bool:
        return z.T == 1

    @staticmethod
    def cost(z: Size) -> Cost:
        # A half step forms one factor and applies it: all four products in two half steps.
        return Cost(0.0, factors(z), factors(z), 0)

    def start(self) -> Tensor:
        return self._squares("right") / math.sqrt(self._sizes["right"])

    def _squares(self, side: Side) -> Tensor:
        """Of the samples' vectors, (N,), summed over directions, the column of a bias included."""
        vectors, constant = self._vectors[side], self._constants[side]
        squares = torch.linalg.vecdot(vectors, vectors).view(-1, self._count).sum(0)
        return squares if constant is None else squares + constant**2

    def apply(self, matrix: Tensor, side: Side) -> Tensor:
        vectors, constant = self._vectors[side], self._constants[side]
        inner = matrix if constant is None else matrix[:-1, :-1]
        products, diagonal = [], halves(inner)
        for start, stop in self._parts(vectors):
            rows = vectors[start:stop]
            by_half = times_half(rows, inner, diagonal, self._scratch.like(rows))
            products.append(torch.linalg.vecdot(by_half, rows))
        image = torch.cat(products)
        if constant is not None:
            image.addmv_(vectors, matrix[:-1, -1], alpha=constant)
            image += constant**2 / 2 * matrix[-1, -1]
        return image.view(-1, self._count).sum(0).mul_(2)

    def apply_rows(self, rows: Tensor, side: Side) -> Tensor:
        """As `apply`, from the factor `rows^T rows`, which is of low rank; rows of (r, n)."""
        products = self._times(rows.mT, side)
        return products.square_().sum(1).view(-1, self._count).sum(0)

    def changed(self, first: Formed, second: Tensor, scale: float, probes: Tensor) -> Tensor:
        """As that of plans with several positions; estimated from some samples of many.

        These are drawn by their parts in the first factor, so that none with a large one is missed.
        """
        before, some, shares = first.coefficients, self, None
        if self._count > SOME:
            parts = (before * self._squares(first.side)).double().clamp_min(0)
            sums, generator = parts.cumsum(0), torch.Generator().manual_seed(3)
            points = 1 - torch.rand(SOME, generator=generator, dtype=torch.float64)  # in (0, 1]
            chosen = torch.searchsorted(sums, points.to(sums) * sums[-1])
            some, before = self._of(chosen), before[chosen]
            shares = (sums[-1] / (SOME * parts[chosen])).to(before)
        weights = some.apply(second, opposite(first.side)).mul_(scale).sub_(before)
        weights = weights if shares is None else weights * shares
        products = some._times(probes, first.side)
        return products.mT @ (products * weights.repeat(len(products) // len(weights))[:, None])

    def _of(self, chosen: Tensor) -> Primal:
        """The same of some samples, by their numbers."""
        some = copy(self)
        some._count, some._last = len(chosen), None
        some._vectors = {
            side: rows.view(-1, self._count, rows.shape[1])[:, chosen].flatten(0, 1)
            for side, rows in self._vectors.items()
        }
        return some

    def _times(self, columns: Tensor, side: Side) -> Tensor:
        """All vectors of a side, the column of a bias included, times columns (n, k)."""
        vectors, constant = self._vectors[side], self._constants[side]
        if constant is None:
            return vectors @ columns
        return torch.addmm(columns[-1], vectors, columns[:-1], beta=constant)

    def projected(self, rank: int) -> tuple[Samples, dict[Side, Tensor | None]] | None:
        """The samples in coordinates of about `rank` directions on either side.

        The directions span random sums of samples, after a step of subspace iteration: mostly
        what is large in the samples.

        Returns:
            The samples; and per side the directions, (k, n), or None where none were left out.
            None if so few directions do not have most of the samples, by a few of them.
        """
        vectors: dict[Side, Tensor] = {}
        bases: dict[Side, Tensor | None] = {}
        sides: tuple[Side, Side] = "left", "right"
        for side in sides:
            of_side = self._vectors[side]
            bases[side], vectors[side] = None, of_side
            if of_side.shape[1] > 2 * rank:
                basis = orthonormal(random_sums(of_side, rank))
                few = of_side[:: max(1, len(of_side) // FEW)]
                if (few @ basis.mT).norm() ** 2 < CAPTURED * few.norm() ** 2:
                    return None
                inner = of_side @ basis.mT
                bases[side] = basis = orthonormal(inner.mT @ of_side)
                vectors[side] = of_side @ basis.mT
        inputs = Rows(vectors["right"][:, None], self._constants["right"])
        grads = vectors["left"].view(-1, self._count, 1, vectors["left"].shape[1])
        return Samples(inputs, grads), bases

    def factor(self, representation: Tensor, side: Side) -> Tensor:
        return mirrored(self._upper(representation, side))

    def accumulate(self, total: Tensor, representation: Tensor, side: Side, scale: float) -> None:
        self._add(total, representation, side, scale, 1.0)

    def _image(self, representation: Tensor, side: Side) -> Tensor:
        return self.apply(self._upper(representation, side), side)

    def _upper(self, representation: Tensor, side: Side) -> Tensor:
        """The factor on and above the diagonal."""
        size = self._sizes[side]
        total = representation.new_empty(size, size)
        self._add(total, representation, side, 1.0, 0.0)
        return total

    def positive(self, representation: Tensor, side: Side) -> bool:
        return representation.min().item() >= -1e-6 * representation.max().item()

    def _add(
        self, total: Tensor, representation: Tensor, side: Side, alpha: float, beta: float
    ) -> None:
        vectors, constant = self._vectors[side], self._constants[side]
        repeats = vectors.shape[0] // self._count
        signed = not self.positive(representation, side)
        # The weights go on both sides as roots: the product is then a Gram matrix, and PSD.
        # Rounding and extrapolation can bring a weight under zero, and no further; of a factor
        # that is not PSD they go on one side.
        weights = representation if signed else representation.clamp_min(0)
        weights = weights.repeat(repeats) if repeats > 1 else weights
        inner = total if constant is None else total[:-1, :-1]
        if constant is not None:
            # Into a column at once a product of vectors takes ten times as long.
            column = (vectors.mT @ weights).mul_(alpha * constant)
            total[:-1, -1] = column.add_(total[:-1, -1], alpha=beta) if beta else column
            corner = alpha * constant**2 * weights.sum()
            total[-1, -1] = corner + beta * total[-1, -1] if beta else corner
        roots = weights if signed else weights.sqrt()
        for start, stop in self._parts(vectors):
            rows = vectors[start:stop]
            scaled = torch.mul(rows, roots[start:stop, None], out=self._scratch.like(rows))
            other = rows if signed else scaled
            add_symmetric(inner, other, scaled, alpha=alpha, beta=beta)
            beta = 1.0

    @staticmethod
    def _parts(vectors: Tensor) -> list[tuple[int, int]]:
        """Ranges of rows whose temporaries stay small."""
        count, step = len(vectors), max(256, CHUNK // max(1, vectors.shape[1]))
        return [(start, min(start + step, count)) for start in range(0, count, step)]

    def _kernel(self, side: Side, start: int, stop: int) -> Tensor:
        """Rows `start` to `stop` of the squared inner products between samples, over directions."""
        vectors, count, constant = self._vectors[side], self._count, self._constants[side]
        directions = vectors.view(-1, count, vectors.shape[1])
        kernel = vectors.new_zeros(stop - start, count)
        for rows in directions[:, start:stop]:
            for others in directions:
                products = rows @ others.mT
                kernel += (products if constant is None else products + constant**2).square_()
        return kernel

    def squared_norm(self) -> float:
        """`sum_{n,m} (a_n.a_m)^2 (g_n.g_m)^2`, by chunks of rows."""
        total, step = 0.0, max(1, CHUNK // self._count)
        for start in range(0, self._count, step):
            stop = min(start + step, self._count)
            product = self._kernel("left", start, stop).mul_(self._kernel("right", start, stop))
            total += product.sum(dtype=torch.float64).item()
        return total


class Gram(Primal):
    """The half steps are products with the two (N, N) matrices of squared inner products.

    The matrices are formed when first asked for: a half step from an explicit factor does without.
    """

    plan = "gram"
    cheap_steps = True

    def __init__(self, samples: Samples, memory_limit: int = 0) -> None:
        super().__init__(samples, memory_limit)
        self._kernels: dict[Side, Tensor] = {}

    @staticmethod
    def cost(z: Size) -> Cost:
        left = share(z.N) if z.S == 1 else 1.0
        setup = z.N**2 * (share(z.N) * z.i + left * z.S**2 * z.o)
        return Cost(setup, z.N**2, factors(z), 2 * z.N**2)

    @property
    def certifies(self) -> bool:
        return True

    def forget(self) -> None:
        super().forget()
        self._kernels.clear()

    def _whole(self, side: Side) -> Tensor:
        if side not in self._kernels:
            vectors = self._vectors[side]
            single = len(vectors) == self._count
            if single:
                kernel = gram(vectors.mT)
                kernel = kernel.add_((self._constants[side] or 0.0) ** 2).square_()
            else:
                kernel = self._kernel(side, 0, self._count)
            self._kernels[side] = kernel
        return self._kernels[side]

    def _image(self, representation: Tensor, side: Side) -> Tensor:
        return self._whole(side) @ representation

    def squared_norm(self) -> float:
        product = self._whole("left") * self._whole("right")
        return product.sum(dtype=torch.float64).item()


def single_rows(inputs: Inputs) -> tuple[Tensor, float | None]:
    """Inputs of one position, as (N, i) or, with a constant last column, as (N, i - 1) and that."""
    if isinstance(inputs, Rows):
        return inputs.values[:, 0], inputs.constant
    return inputs.columns(0, inputs.num_samples)[:, :, 0].mT, None


def random_sums(vectors: Tensor, count: int) -> Tensor:
    """Sums of rows with random signs, (count, n): each row has a part in one.

    What is not in them a sketch may be orthogonal to, and then no half step finds it.
    """
    length = max(1, len(vectors) // count)
    used = vectors[: length * count].view(-1, length, vectors.shape[1])
    generator = torch.Generator().manual_seed(0)
    signs = torch.randint(2, used.shape[:2], generator=generator) * 2 - 1
    sums = torch.bmm(signs[:, None].to(vectors), used)[:, 0]
    rest = vectors[length * count :]  # fewer than the sums
    sums[: len(rest)] += rest
    return sums
