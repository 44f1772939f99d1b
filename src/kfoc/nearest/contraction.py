"""Algorithm 1 of the paper: the Kronecker product closest to a sum of Kronecker products.

Every sum of Kronecker products `sum_k L_k (x) R_k` is, after the rearrangement of Lemma 3.1, the
matrix `A = sum_k vec(L_k) vec(R_k)^T`; the closest single product is its leading singular triple
(Lemma 3.2), found by the power iteration. How `A` is applied is left to a `Contraction`, so that
the same iteration serves explicit factors here and a layer's samples in `kfoc.plans`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Literal

import torch
from torch import Tensor

Side = Literal["left", "right"]


def opposite(side: Side) -> Side:
    return "right" if side == "left" else "left"


class Contraction(ABC):
    """The rearranged sum `A` of one set of terms, as an operator on representations of factors.

    A representation is whatever the plan iterates on: the factor itself, or the coefficients of
    the factor in the terms. Sides name where a representation lives: `advance(x, "left")` takes a
    left factor to the right factor `A^T x`, and the other way round.
    """

    plan: str
    # Representations are coefficients of the factor in the terms: the inner product of two factors
    # is that of the one's representation with the other's image, as arrays.
    implicit = False
    # A half step costs next to nothing beside what has been set up: not worth saving.
    cheap_steps = False

    @property
    def certifies(self) -> bool:
        """Whether `squared_norm` comes at next to no cost."""
        return False

    @abstractmethod
    def start(self) -> Tensor:
        """A left representation: the half step from the unit factor `right = I / sqrt(i)`."""

    @abstractmethod
    def apply(self, matrix: Tensor, side: Side) -> Tensor:
        """Half step from an explicit factor on `side` to a representation on the other side."""

    @abstractmethod
    def advance(self, representation: Tensor, side: Side) -> Tensor:
        """Half step from a representation on `side` to one on the other side."""

    @abstractmethod
    def factor(self, representation: Tensor, side: Side) -> Tensor:
        """The explicit factor, (o, o) or (i, i), that a representation stands for.

        Exactly symmetric where the terms are.
        """

    def accumulate(self, total: Tensor, representation: Tensor, side: Side, scale: float) -> None:
        """`total += scale * factor`, in place, on and above the diagonal at least."""
        total.add_(self.factor(representation, side), alpha=scale)

    @abstractmethod
    def inner(self, first: Tensor, second: Tensor, side: Side) -> Tensor:
        """Frobenius inner product of the factors behind two representations, a scalar."""

    def overlap(self, representation: Tensor, matrix: Tensor, image: Tensor, side: Side) -> Tensor:
        """Inner product of a represented factor with `matrix`, whose half step is `image`."""
        return (self.factor(representation, side) * matrix).sum()

    def forget(self) -> None:  # noqa: B027  (most keep nothing)
        """Give back memory that can be formed anew: the steps are done."""

    def positive(self, representation: Tensor, side: Side) -> bool:
        """Whether the factor that a representation stands for is PSD, up to rounding."""
        return positive(self.factor(representation, side))

    @abstractmethod
    def squared_norm(self) -> float:
        """`||A||_F^2`, the squared Frobenius norm of the whole sum."""


def positive(matrices: Tensor) -> bool:
    """Whether symmetric matrices (..., n, n) are PSD, up to a little more than rounding."""
    info = torch.finfo(matrices.dtype)
    largest = matrices.diagonal(dim1=-2, dim2=-1).amax(-1, keepdim=True)
    shifted = matrices.clone()
    shifted.diagonal(dim1=-2, dim2=-1).add_(largest * (100 * info.eps) + info.tiny)
    return not torch.linalg.cholesky_ex(shifted).info.any()
