"""Blocks with damping, factorised: what can be solved with."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from kfoc.blocks.spectrum import Spectrum
from kfoc.common.ambient import Plain
from kfoc.common.arguments import number, one_of

METHODS = ("exact", "pi")


@dataclass(frozen=True)
class Damping:
    """`scale * F + damping * identity`, or its factored stand-in.

    Attributes:
        damping: not negative.
        scale: positive: the number of samples makes the sum of F, the mean.
        method: "exact", or "pi" for the factored Tikhonov damping of Martens & Grosse (2015):
            `kron(left + sqrt(damping) / pi, right + pi * sqrt(damping))`, with pi^2 the ratio of
            the factors' mean eigenvalues, right by left. It is for Kronecker products; other kinds
            of block are damped exactly under it too.
    """

    damping: float
    scale: float = 1.0
    method: str = "exact"

    def __post_init__(self) -> None:
        one_of("method", self.method, METHODS)
        number("damping", self.damping)
        number("scale", self.scale)
        if not 0 <= self.damping < math.inf:
            raise ValueError(f"damping must be finite and not negative, found {self.damping}")
        if not 0 < self.scale < math.inf:
            raise ValueError(f"scale must be finite and positive, found {self.scale}")

    def values(self, spectrum: Spectrum) -> Tensor:
        """The damped eigenvalues, (o, i)."""
        if self.method == "exact" or spectrum.factors is None:
            return spectrum.values * self.scale + self.damping
        left, right = spectrum.factors
        shifts, scale = self.shifts(left, right), math.sqrt(self.scale)
        return (left * scale + shifts[0])[:, None] * (right * scale + shifts[1])

    def shifts(self, left: Tensor, right: Tensor) -> tuple[float, float]:
        """What factored damping adds to the factors, each times `sqrt(scale)`.

        Args:
            left, right: (o,) and (i,), their eigenvalues or diagonals: of the same means.
        """
        means = left.double().mean().item(), right.double().mean().item()
        pi = math.sqrt(means[1] / means[0]) if min(means) > 0 else 1.0
        root = math.sqrt(self.damping)
        return root / pi, pi * root


class DampedBlock(Plain, ABC):
    """`B = scale * F + damping * identity` for one layer, ready to be solved with."""

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype:
        """That of the computation: vectors come and go in it."""

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int]:
        """(o, i)."""

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Where vectors must be."""

    @abstractmethod
    def power(self, vectors: Tensor, exponent: float) -> Tensor:
        """`B^exponent` times vectors (..., o, i), for an exponent of 1, 1/2, -1/2 or -1.

        Raises:
            ValueError: B is singular (or indefinite) and the exponent does not allow that.
        """

    @abstractmethod
    def logdet(self) -> float:
        """`ln det B`."""

    def inverse_diagonal(self) -> Tensor:
        """The diagonal of `B^-1`, (o, i): the marginal variances of N(0, B^-1).

        By a solve for every unit vector, where a kind of block has nothing better.

        Raises:
            ValueError: B is singular or indefinite.
        """
        o, i = self.shape
        found = torch.empty(o, i, dtype=self.dtype, device=self.device)
        for row in range(o):
            units = torch.zeros(i, o, i, dtype=self.dtype, device=self.device)
            units[:, row] = torch.eye(i, dtype=self.dtype, device=self.device)
            found[row] = self.power(units, -1)[:, row].diagonal()
        return found

    def eigenvalues(self) -> Tensor:
        """Those of B, (o * i,), in no order.

        Raises:
            ValueError: a kind of block that does not have them at hand.
        """
        raise ValueError(f"a {type(self).__name__} does not say what its eigenvalues are")

    @abstractmethod
    def redamped(self, damping: Damping) -> DampedBlock:
        """The same F with another damping, reusing the factorisation."""

    def draw(self, noise: Tensor) -> Tensor:
        """Samples of N(0, B^-1) from standard normal noise (..., o, i)."""
        return self.power(noise, -0.5)


@dataclass(frozen=True)
class DampedSpectrum(DampedBlock):
    """From the eigendecomposition of F."""

    spectrum: Spectrum
    damping: Damping

    @property
    def dtype(self) -> torch.dtype:
        return self.spectrum.values.dtype

    @property
    def shape(self) -> tuple[int, int]:
        return self.spectrum.values.shape[0], self.spectrum.values.shape[1]

    @property
    def device(self) -> torch.device:
        return self.spectrum.values.device

    @cached_property
    def values(self) -> Tensor:
        """The eigenvalues of B, (o, i)."""
        return self.damping.values(self.spectrum)

    def power(self, vectors: Tensor, exponent: float) -> Tensor:
        if exponent != 1:
            self._check(exponent)
        basis = self.spectrum.basis
        return basis.back(basis.to(vectors) * self.values**exponent)

    def logdet(self) -> float:
        self._check(-1)
        return self.values.double().log().sum().item()

    def inverse_diagonal(self) -> Tensor:
        self._check(-1)
        return self.spectrum.basis.diagonal(1 / self.values)

    def eigenvalues(self) -> Tensor:
        return self.values.flatten()

    def redamped(self, damping: Damping) -> DampedSpectrum:
        return DampedSpectrum(self.spectrum, damping)

    def _check(self, exponent: float) -> None:
        """Raise where B has no such power.

        With damping, a semi-definite F always has one, as its eigenvalues are clamped at zero: the
        largest may exceed the damping by more than the precision.
        """
        low, high = (value.item() for value in torch.aminmax(self.spectrum.values))
        rounding = self.values.numel() * torch.finfo(self.dtype).eps * abs(high)
        scale, damping = self.damping.scale, self.damping.damping
        if low < 0 and scale * (low - rounding) + damping <= 0:
            raise ValueError(
                f"the block is indefinite (smallest eigenvalue {scale * low:.3g}): damping must "
                f"exceed {-scale * low:.3g}, found {damping}"
            )
        if exponent < 0 and not damping and low <= rounding:
            raise ValueError(
                f"the block is singular (eigenvalues from {scale * low:.3g} to "
                f"{scale * high:.3g}): damping must be positive, found {damping}"
            )
