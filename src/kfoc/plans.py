"""Algorithm 2 of the paper: ways to contract a layer's samples without forming their products.

With `A` the rearrangement of `sum_{s,n} vec(X) vec(X)^T`, a half step is
`left = sum X right X^T` or `right = sum X^T left X`. Every plan computes the same numbers; they
differ in multiply-adds and memory, by factors of a hundred.

| plan | iterates on | a half step costs |
|---|---|---|
| gram | weights of the samples (T = 1) | N^2, by the two Gram matrices |
| primal | weights of the samples (T = 1) | N i^2 or S N o^2, through the factors |
| gradients | factors | 2 S N (o i^2 + o^2 i) / 2, by the per-sample gradients |
| dense | factors | (o i)^2, by F itself |
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from kfoc.kronecker import Contraction, Side
from kfoc.samples import Samples

# Temporaries of a chunk hold at most so many numbers: small enough to stay near the cache, large
# enough that the matrix products run at full rate.
CHUNK = 2**22


class _Weighted(Contraction):
    """T = 1: `left = sum_n w_n sum_s g g^T` and `right = sum_n v_n a a^T`, iterated on w and v.

    The weights are `w_n = a^T right a` and `v_n = sum_s g^T left g`: never negative, so the
    factors are PSD by construction, and they need forming only once, at the end.
    """

    def __init__(self, samples: Samples) -> None:
        self._count = samples.num_samples
        self._vectors = {
            "left": samples.grads[:, :, 0].flatten(0, 1),
            "right": samples.inputs.columns(0, self._count)[:, :, 0].mT,
        }
        self._last: tuple[Tensor, Tensor] | None = None

    def start(self) -> Tensor:
        return self._vectors["right"].square().sum(1)

    def apply(self, matrix: Tensor, side: Side) -> Tensor:
        vectors = self._vectors[side]
        # Clamped, as rounding must not hand a negative weight to the root in `factor`.
        return self._over_directions(torch.linalg.vecdot(vectors @ matrix, vectors)).clamp_min_(0)

    def factor(self, representation: Tensor, side: Side) -> Tensor:
        vectors = self._vectors[side]
        repeats = vectors.shape[0] // self._count
        # The weights go on both sides as roots: the product is then a Gram matrix, exactly PSD.
        scaled = vectors * representation.sqrt().repeat(repeats)[:, None]
        return scaled.mT @ scaled

    def advance(self, representation: Tensor, side: Side) -> Tensor:
        if self._last is None or self._last[0] is not representation:
            self._last = representation, self._image(representation, side)
        return self._last[1]

    def _image(self, representation: Tensor, side: Side) -> Tensor:
        raise NotImplementedError

    def inner(self, first: Tensor, second: Tensor, side: Side) -> Tensor:
        return torch.dot(first, self.advance(second, side))

    def overlap(self, representation: Tensor, matrix: Tensor, image: Tensor, side: Side) -> Tensor:
        return torch.dot(representation, image)

    def _over_directions(self, values: Tensor) -> Tensor:
        return values.view(-1, self._count).sum(0)

    def _kernel(self, side: Side, start: int, stop: int) -> Tensor:
        """Rows `start` to `stop` of the squared inner products between samples, over directions."""
        vectors, count = self._vectors[side], self._count
        by_direction = vectors.view(-1, count, vectors.shape[1])
        kernel = vectors.new_zeros(stop - start, count)
        for rows in by_direction[:, start:stop]:
            for others in by_direction:
                kernel += (rows @ others.mT).square_()
        return kernel

    def squared_norm(self) -> float:
        """`sum_{n,m} (a_n.a_m)^2 (g_n.g_m)^2`, by chunks of rows."""
        total, step = 0.0, max(1, CHUNK // self._count)
        for start in range(0, self._count, step):
            stop = min(start + step, self._count)
            product = self._kernel("left", start, stop).mul_(self._kernel("right", start, stop))
            total += product.sum(dtype=torch.float64).item()
        return total


class Gram(_Weighted):
    """The half steps are products with the two (N, N) matrices of squared inner products."""

    plan = "gram"

    def __init__(self, samples: Samples) -> None:
        super().__init__(samples)
        # Formed when first asked for: a half step from an explicit factor does without.
        self._kernels: dict[Side, Tensor] = {}

    def _whole(self, side: Side) -> Tensor:
        if side not in self._kernels:
            self._kernels[side] = self._kernel(side, 0, self._count)
        return self._kernels[side]

    def _image(self, representation: Tensor, side: Side) -> Tensor:
        return self._whole(side) @ representation

    def squared_norm(self) -> float:
        product = self._whole("left") * self._whole("right")
        return product.sum(dtype=torch.float64).item()


class Primal(_Weighted):
    """The half steps go through the factors: cheaper where N is large against o and i."""

    plan = "primal"

    def _image(self, representation: Tensor, side: Side) -> Tensor:
        return self.apply(self.factor(representation, side), side)


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
        self._per_sample = max(per_sample, samples.num_positions * i)
        total = per_sample * samples.num_samples * samples.grads.element_size()
        self._keep = total <= memory_limit
        self._stored: list[Tensor] | None = None

    def _formed(self) -> Iterator[Tensor]:
        for start, stop in self._samples.chunks(self._per_sample, CHUNK):
            gradients = self._samples.gradients(start, stop)
            yield gradients.flatten(0, 1).transpose(0, 1).contiguous()

    def _chunks(self) -> Iterator[Tensor]:
        if self._keep and self._stored is None:
            self._stored = list(self._formed())
        return iter(self._stored) if self._stored is not None else self._formed()

    def start(self) -> Tensor:
        o, _ = self._samples.shape
        left = self._samples.grads.new_zeros(o, o)
        for gradients in self._chunks():
            rows = gradients.flatten(1)
            left.addmm_(rows, rows.mT)
        return left

    def advance(self, representation: Tensor, side: Side) -> Tensor:
        o, i = self._samples.shape
        size = i if side == "left" else o
        image = representation.new_zeros(size, size)
        for gradients in self._chunks():
            rows = gradients.view(-1, i)  # (o S n, i)
            wide = gradients.view(o, -1)  # (o, S n i)
            if side == "left":
                image.addmm_(rows.mT, (representation @ wide).view(-1, i))
            else:
                image.addmm_((rows @ representation).view(o, -1), wide.mT)
        return image

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

    def __init__(self, samples: Samples) -> None:
        self._shape = o, i = samples.shape
        fisher = samples.grads.new_zeros(o * i, o * i)
        per_sample = max(samples.num_directions * o * i, samples.num_positions * i)
        for start, stop in samples.chunks(per_sample, CHUNK):
            rows = samples.gradients(start, stop).reshape(-1, o * i)
            fisher.addmm_(rows.mT, rows)
        self._matrix = fisher.view(o, i, o, i).transpose(1, 2).reshape(o * o, i * i)

    def start(self) -> Tensor:
        o, i = self._shape
        diagonal = self._matrix.view(o * o, i, i).diagonal(dim1=1, dim2=2)
        return diagonal.sum(1).view(o, o)

    def advance(self, representation: Tensor, side: Side) -> Tensor:
        o, i = self._shape
        if side == "left":
            return (representation.reshape(-1) @ self._matrix).view(i, i)
        return (self._matrix @ representation.reshape(-1)).view(o, o)

    def squared_norm(self) -> float:
        return self._matrix.square().sum(dtype=torch.float64).item()


def contract(samples: Samples, memory_limit: int = 2**30, plan: str | None = None) -> Contraction:
    """The contraction of `samples` by the named plan, or by the cheapest that fits the memory."""
    o, i = samples.shape
    count = samples.num_samples
    if plan is None:
        if samples.num_positions == 1:
            fits = 2 * count**2 * samples.grads.element_size() <= memory_limit
            plan = "gram" if count <= 2 * (o + i) and fits else "primal"
        else:
            plan = "gradients"
    return PLANS[plan](samples, memory_limit)


PLANS = {
    "gram": lambda samples, limit: Gram(samples),
    "primal": lambda samples, limit: Primal(samples),
    "gradients": Gradients,
    "dense": lambda samples, limit: Dense(samples),
}
