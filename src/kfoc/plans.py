"""Algorithm 2 of the paper: ways to contract a layer's samples without forming their products.

With `A` the rearrangement of `sum_{s,n} vec(X) vec(X)^T`, a half step is
`left = sum X right X^T` or `right = sum X^T left X`. Every plan computes the same numbers; they
differ in multiply-adds and memory, by factors of a hundred.

| plan | iterates on | a half step goes |
|---|---|---|
| gram (T = 1) | a weight per sample | through squared inner products between samples |
| primal (T = 1) | a weight per sample | through the factors |
| position_gram | a (T, T) matrix per sample | through inner products between positions |
| positions | a (T, T) matrix per sample | through the factors |
| gradients | the factors | through the per-sample gradients X |
| dense | the factors | through F itself |
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from kfoc.kronecker import Contraction, Side, positive
from kfoc.products import add_symmetric, gram, halves, mirrored, share, times_half
from kfoc.samples import Inputs, LayerSamples, Rows, Samples, gradient_chunks

# Temporaries of a chunk hold at most so many numbers: small enough to stay near the cache, large
# enough that the matrix products run at full rate.
CHUNK = 2**20

# Columns of a matrix product that is one of many: fewer would run at a lower rate.
COLUMNS = 256


class _Coefficients(Contraction):
    """Plans that iterate on coefficients of the factors in the samples.

    The image of a representation, once asked for, is kept: the norm of a factor is the inner
    product of its coefficients with their image, and the next half step starts from that image.
    """

    implicit = True

    def __init__(self) -> None:
        self._last: tuple[Tensor, Tensor] | None = None

    @property
    def reads_upper(self) -> bool:
        return True

    def advance(self, representation: Tensor, side: Side) -> Tensor:
        if self._last is None or self._last[0] is not representation:
            self._last = representation, self._image(representation, side)
        return self._last[1]

    def _image(self, representation: Tensor, side: Side) -> Tensor:
        return self.apply(self.factor(representation, side), side)

    def forget(self) -> None:
        self._last = None

    def inner(self, first: Tensor, second: Tensor, side: Side) -> Tensor:
        return (first * self.advance(second, side)).sum()

    def overlap(self, representation: Tensor, matrix: Tensor, image: Tensor, side: Side) -> Tensor:
        return (representation * image).sum()


class _Scratch:
    """Memory for temporaries, kept: fresh pages cost as much as the products that fill them."""

    def __init__(self) -> None:
        self._memory: Tensor | None = None

    def like(self, tensor: Tensor) -> Tensor:
        """Uninitialised and contiguous, in the shape of `tensor`; valid until the next call."""
        count = tensor.numel()
        if self._memory is None or self._memory.numel() < count:
            self._memory = tensor.new_empty(count)
        return self._memory[:count].view(tensor.shape)


class Primal(_Coefficients):
    """T = 1: `left = sum_n w_n sum_s g g^T` and `right = sum_n v_n a a^T`, iterated on w and v.

    The weights are `w_n = a^T right a` and `v_n = sum_s g^T left g`: never negative, so the
    factors are PSD by construction.
    """

    plan = "primal"

    def __init__(self, samples: Samples) -> None:
        super().__init__()
        self._count = samples.num_samples
        right, constant = single_rows(samples.inputs)
        self._vectors = {"left": samples.grads[:, :, 0].flatten(0, 1), "right": right}
        self._constants: dict[Side, float | None] = {"left": None, "right": constant}
        self._sizes = dict(zip(("left", "right"), samples.shape, strict=True))
        self._scratch = _Scratch()

    def start(self) -> Tensor:
        vectors, constant = self._vectors["right"], self._constants["right"]
        squares = torch.linalg.vecdot(vectors, vectors)
        squares = squares if constant is None else squares + constant**2
        return squares / math.sqrt(self._sizes["right"])

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
        # The weights go on both sides as roots: the product is then a Gram matrix, and PSD.
        # Rounding and extrapolation can bring a weight under zero, and no further.
        weights = representation.clamp_min(0)
        weights = weights.repeat(repeats) if repeats > 1 else weights
        inner = total if constant is None else total[:-1, :-1]
        if constant is not None:
            total[:-1, -1].addmv_(vectors.mT, weights, alpha=alpha * constant, beta=beta)
            corner = alpha * constant**2 * weights.sum()
            total[-1, -1] = corner + beta * total[-1, -1] if beta else corner
        roots = weights.sqrt()
        for start, stop in self._parts(vectors):
            rows = vectors[start:stop]
            scaled = torch.mul(rows, roots[start:stop, None], out=self._scratch.like(rows))
            add_symmetric(inner, scaled, scaled, alpha=alpha, beta=beta)
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

    def __init__(self, samples: Samples) -> None:
        super().__init__(samples)
        self._kernels: dict[Side, Tensor] = {}

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


class Positions(_Coefficients):
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
        self._scratch = _Scratch()

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


class _Explicit(Contraction):
    """Plans that iterate on the factors themselves."""

    def apply(self, matrix: Tensor, side: Side) -> Tensor:
        return self.advance(matrix, side)

    def factor(self, representation: Tensor, side: Side) -> Tensor:
        return representation

    def inner(self, first: Tensor, second: Tensor, side: Side) -> Tensor:
        return (first * second).sum()

    def overlap(self, representation: Tensor, matrix: Tensor, image: Tensor, side: Side) -> Tensor:
        return (representation * matrix).sum()


class Gradients(_Explicit):
    """The half steps are matrix products with the per-sample gradients, held as (o, S n, i).

    With the output dimension first, both products of a half step are single large matrix products.
    Gradients that would not fit `memory_limit` bytes are formed anew in every half step.
    """

    plan = "gradients"

    def __init__(self, samples: Samples, memory_limit: int) -> None:
        self._samples = samples
        o, i = samples.shape
        per_sample = samples.num_directions * o * i
        total = per_sample * samples.num_samples * samples.grads.element_size()
        self._keep = total <= memory_limit
        self._scratch = _Scratch()
        self._stored: list[Tensor] | None = None

    def _formed(self) -> Iterator[Tensor]:
        for gradients in gradient_chunks(self._samples, CHUNK):
            yield gradients.flatten(0, 1).transpose(0, 1).contiguous()

    def _chunks(self) -> Iterator[Tensor]:
        if self._keep and self._stored is None:
            self._stored = list(self._formed())
        return iter(self._stored) if self._stored is not None else self._formed()

    def start(self) -> Tensor:
        o, i = self._samples.shape
        left = self._samples.grads.new_zeros(o, o)
        for gradients in self._chunks():
            rows = gradients.flatten(1).mT
            add_symmetric(left, rows, rows, alpha=1 / math.sqrt(i))
        return mirrored(left)

    def advance(self, representation: Tensor, side: Side) -> Tensor:
        o, i = self._samples.shape
        if side == "left":
            image = representation.new_zeros(i, i)
            for gradients in self._chunks():
                wide = gradients.view(o, -1)
                product = torch.mm(representation, wide, out=self._scratch.like(wide))
                add_symmetric(image, gradients.view(-1, i), product.view(-1, i))
            return mirrored(image)
        image, diagonal = representation.new_zeros(o, o), halves(representation)
        for gradients in self._chunks():
            rows = gradients.view(-1, i)
            product = times_half(rows, representation, diagonal, self._scratch.like(rows))
            image.addmm_(product.view(o, -1), gradients.view(o, -1).mT)
        return image + image.mT

    def squared_norm(self) -> float:
        """`sum_{k,l} <X_k, X_l>^2`, the squared Gram matrix of the per-sample gradients."""
        total = 0.0
        for first in self._chunks():
            for second in self._chunks():
                products = torch.einsum("oki,oli->kl", first, second)
                total += products.square_().sum(dtype=torch.float64).item()
        return total


class Dense(_Explicit):
    """The half steps are products with F itself, rearranged to (o^2, i^2)."""

    plan = "dense"
    cheap_steps = True

    def __init__(self, samples: Samples) -> None:
        o, i = samples.shape
        fisher = samples.grads.new_zeros(o * i, o * i)
        add_fisher(fisher, samples)
        self._take(fisher, samples.shape)

    @classmethod
    def of(cls, fisher: Tensor, shape: tuple[int, int]) -> Dense:
        """The contraction of a sum formed by `add_fisher`; completes it in place."""
        contraction = cls.__new__(cls)
        contraction._take(fisher, shape)
        return contraction

    def _take(self, fisher: Tensor, shape: tuple[int, int]) -> None:
        self._shape = o, i = shape
        fisher = mirrored(fisher).view(o, i, o, i)
        self._matrix = fisher.transpose(1, 2).reshape(o * o, i * i)

    @property
    def certifies(self) -> bool:
        return True

    def start(self) -> Tensor:
        o, i = self._shape
        diagonal = self._matrix.view(o * o, i, i).diagonal(dim1=1, dim2=2)
        return diagonal.sum(1).view(o, o) / math.sqrt(i)

    def advance(self, representation: Tensor, side: Side) -> Tensor:
        o, i = self._shape
        flat = representation.reshape(-1)
        if side == "left":
            image = (flat @ self._matrix).view(i, i)
        else:
            image = (self._matrix @ flat).view(o, o)
        # The sums over the matrix round differently above and below the diagonal.
        return (image + image.mT) / 2

    def squared_norm(self) -> float:
        return self._matrix.square().sum(dtype=torch.float64).item()


def add_fisher(total: Tensor, samples: LayerSamples, scale: float = 1.0) -> None:
    """`total += scale * sum vec(X) vec(X)^T`, (o * i, o * i), on and above the diagonal."""
    o, i = samples.shape
    for gradients in gradient_chunks(samples, CHUNK):
        rows = gradients.reshape(-1, o * i)
        add_symmetric(total, rows, rows, alpha=scale)
