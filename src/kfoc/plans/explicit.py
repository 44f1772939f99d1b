"""The factors themselves are iterated on: by per-sample gradients, or by F."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from kfoc.linalg.products import add_symmetric, halves, mirrored, share, times_half
from kfoc.nearest.contraction import Side
from kfoc.plans.base import CHUNK, Formed, Plan, Scratch, change
from kfoc.plans.cost import Cost, Size
from kfoc.samples.base import LayerSamples, gradient_chunks
from kfoc.samples.linear import Samples


class _Explicit(Plan):
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
        self._scratch = Scratch()
        self._stored: list[Tensor] | None = None

    @staticmethod
    def fits(z: Size) -> bool:
        return z.T != 1  # or there are cheaper ones

    @staticmethod
    def cost(z: Size) -> Cost:
        count = z.S * z.N
        setup = count * z.o * z.i * (z.T + z.o)
        half_step = count * (share(z.i) * z.o * z.i**2 + z.o**2 * z.i)
        return Cost(setup, half_step, 0.0, count * z.o * z.i)

    @property
    def like(self) -> Tensor:
        """For dtype and device."""
        return self._samples.grads

    def _chunks(self) -> Iterator[Tensor]:
        if self._keep and self._stored is None:
            self._stored = list(output_first(self._samples))
        return iter(self._stored) if self._stored is not None else output_first(self._samples)

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

    def apply_rows(self, rows: Tensor, side: Side) -> Tensor:
        """As `apply`, from the factor `rows^T rows`, which is of low rank; rows of (r, n)."""
        o, i = self._samples.shape
        size = o if side == "right" else i
        image = rows.new_zeros(size, size)
        for gradients in self._chunks():
            if side == "right":
                few = (gradients.view(-1, i) @ rows.mT).view(o, -1).mT
            else:
                few = (rows @ gradients.view(o, -1)).view(-1, i)
            add_symmetric(image, few, few)
        return mirrored(image)

    def carried(self, matrices: Tensor, side: Side) -> Tensor:
        """Every `X` times matrices that stand on its right, or `X^T` times those on its left.

        Args:
            matrices: (n, k), or (S N, n, k) with one for each X.

        Returns:
            (S N, i or o, k).
        """
        o, i = self._samples.shape
        found, start = [], 0
        for gradients in self._chunks():
            count = gradients.shape[1]
            each = matrices[start : start + count] if matrices.ndim == 3 else None
            if side == "right":
                if each is None:
                    part = (gradients.view(-1, i) @ matrices).view(o, count, -1).transpose(0, 1)
                else:
                    part = torch.bmm(gradients.transpose(0, 1), each)
            elif each is None:
                part = (matrices.mT @ gradients.view(o, -1)).view(-1, count, i).permute(1, 2, 0)
            else:
                part = torch.bmm(gradients.permute(1, 2, 0), each)
            found.append(part)
            start += count
        return torch.cat(found) if len(found) > 1 else found[0]

    def changed(self, first: Formed, second: Tensor, scale: float, probes: Tensor) -> Tensor:
        """`probes^T (scale * half step from second - first) probes`, (m, m), probes of (n, m)."""
        return change(self.carried(probes, first.side), first, second, scale, probes)

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

    def __init__(self, samples: Samples, memory_limit: int = 0) -> None:
        o, i = samples.shape
        fisher = samples.grads.new_zeros(o * i, o * i)
        add_fisher(fisher, samples)
        self._take(fisher, samples.shape)

    @staticmethod
    def cost(z: Size) -> Cost:
        size = z.o * z.i
        setup = z.S * z.N * size * (z.T + share(size) * size)
        return Cost(setup, size**2, 0.0, 2 * size**2)

    @classmethod
    def of(cls, fisher: Tensor, shape: tuple[int, int]) -> Dense:
        """The contraction of a sum formed by `add_fisher`; completes it in place."""
        contraction = cls.__new__(cls)
        contraction._take(fisher, shape)
        return contraction

    def _take(self, fisher: Tensor, shape: tuple[int, int]) -> None:
        self._shape = o, i = shape
        fisher = mirrored(fisher).view(o, i, o, i)
        self.matrix = fisher.transpose(1, 2).reshape(o * o, i * i)

    @property
    def certifies(self) -> bool:
        return True

    def start(self) -> Tensor:
        o, i = self._shape
        diagonal = self.matrix.view(o * o, i, i).diagonal(dim1=1, dim2=2)
        return diagonal.sum(1).view(o, o) / math.sqrt(i)

    def advance(self, representation: Tensor, side: Side) -> Tensor:
        o, i = self._shape
        flat = representation.reshape(-1)
        if side == "left":
            image = (flat @ self.matrix).view(i, i)
        else:
            image = (self.matrix @ flat).view(o, o)
        # The sums over the matrix round differently above and below the diagonal.
        return (image + image.mT) / 2

    def squared_norm(self) -> float:
        return self.matrix.square().sum(dtype=torch.float64).item()


def output_first(samples: Samples) -> Iterator[Tensor]:
    """Per-sample gradients X by chunks, (o, S n, i)."""
    for gradients in gradient_chunks(samples, CHUNK):
        yield gradients.flatten(0, 1).transpose(0, 1).contiguous()


def add_fisher(total: Tensor, samples: LayerSamples, scale: float = 1.0) -> None:
    """`total += scale * sum vec(X) vec(X)^T`, (o * i, o * i), on and above the diagonal."""
    o, i = samples.shape
    for gradients in gradient_chunks(samples, CHUNK):
        rows = gradients.reshape(-1, o * i)
        add_symmetric(total, rows, rows, alpha=scale)
