"""What plans that iterate on coefficients of the factors have in common."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

from torch import Tensor

from kfoc.nearest.contraction import Contraction, Side
from kfoc.plans.cost import Cost, Size
from kfoc.samples.linear import Samples

# Temporaries of a chunk hold at most so many numbers: small enough to stay near the cache, large
# enough that the matrix products run at full rate.
CHUNK = 2**20


class Plan(Contraction):
    """A contraction of a layer's samples, and what it costs.

    Attributes:
        single: whether it is for samples of one position alone.
    """

    single = False

    @abstractmethod
    def __init__(self, samples: Samples, memory_limit: int) -> None:
        """
        Args:
            memory_limit: bytes that may be kept, where it can also do without.
        """

    @staticmethod
    def fits(z: Size) -> bool:
        """Whether it may be the cheapest for layers of this size."""
        return True

    @staticmethod
    @abstractmethod
    def cost(z: Size) -> Cost:
        """Multiply-adds, and the numbers that it keeps."""


class Coefficients(Plan):
    """Plans that iterate on coefficients of the factors in the samples.

    The image of a representation, once asked for, is kept: the norm of a factor is the inner
    product of its coefficients with their image, and the next half step starts from that image.
    """

    implicit = True

    def __init__(self, samples: Samples, memory_limit: int) -> None:
        self._last: tuple[Tensor, Tensor] | None = None

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


@dataclass(frozen=True)
class Formed:
    """A factor with what it was formed from.

    Attributes:
        factor: (n, n), on `side`.
        coefficients: that stand for it.
    """

    factor: Tensor
    coefficients: Tensor
    side: Side


class Scratch:
    """Memory for temporaries, kept: fresh pages cost as much as the products that fill them."""

    def __init__(self) -> None:
        self._memory: Tensor | None = None

    def like(self, tensor: Tensor) -> Tensor:
        """Uninitialised and contiguous, in the shape of `tensor`; valid until the next call."""
        count = tensor.numel()
        if self._memory is None or self._memory.numel() < count:
            self._memory = tensor.new_empty(count)
        return self._memory[:count].view(tensor.shape)


def change(columns: Tensor, first: Formed, second: Tensor, scale: float, probes: Tensor) -> Tensor:
    """`scale * sum_n Y_n^T second Y_n - probes^T first probes`, (m, m), of columns Y, (M, n, m)."""
    rows = columns.permute(2, 0, 1).contiguous()  # (m, M, n)
    by_step = rows.flatten(1) @ (rows @ second).flatten(1).mT
    return by_step.mul_(scale).sub_(probes.mT @ first.factor @ probes)
