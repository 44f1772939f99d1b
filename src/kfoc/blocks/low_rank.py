"""Sums of Kronecker products."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from kfoc.blocks import iterative, sound
from kfoc.blocks.base import Block
from kfoc.blocks.damped import DampedBlock, DampedSpectrum, Damping
from kfoc.blocks.kronecker import KroneckerBlock
from kfoc.blocks.spectrum import DenseBasis, Spectrum
from kfoc.linalg.eigen import symmetric_eigh

# Up to so many parameters a block is solved with by its dense eigendecomposition, and up to so
# many its determinant comes from a dense Cholesky factor.
EIGEN_LIMIT = 1024
CHOLESKY_LIMIT = 4096


@dataclass(frozen=True)
class LowRankBlock(Block):
    """`sum_t kron(lefts[t], rights[t])`: rank r after the rearrangement of Lemma 3.1.

    The first term is positive semi-definite. The others are not, and **the sum may be indefinite**:
    it is closer to F than any single product, but the directions that F hardly knows can come out
    slightly negative. A damping that does not exceed them is refused where they are found: always
    up to `EIGEN_LIMIT` parameters, and in `logdet` up to `CHOLESKY_LIMIT`; beyond, when conjugate
    gradients or Lanczos meet such a direction, which they do not have to.

    Attributes:
        lefts: (r, o, o), by falling singular value; each symmetric or antisymmetric.
        rights: (r, i, i), each of the same norm and symmetry as its left.
    """

    lefts: Tensor
    rights: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        return self.lefts.shape[1], self.rights.shape[1]

    @property
    def rank(self) -> int:
        return len(self.lefts)

    def check(self) -> None:
        pairs = sound.symmetries("lefts", self.lefts), sound.symmetries("rights", self.rights)
        if len(pairs[0]) != len(pairs[1]):
            raise ValueError(f"it has {len(pairs[0])} lefts and {len(pairs[1])} rights")
        for k, (left, right) in enumerate(zip(*pairs, strict=True)):
            if left * right < 0:
                raise ValueError(f"its term {k} must be symmetric on both sides or on neither")
        sound.same_dtype(self.lefts, self.rights)

    def to_dense(self) -> Tensor:
        o, i = self.shape
        return torch.einsum("tab,tij->aibj", self.lefts, self.rights).reshape(o * i, o * i)

    def matvec(self, vectors: Tensor) -> Tensor:
        self._check_vectors(vectors)
        total = torch.zeros_like(vectors)
        for left, right in zip(self.lefts, self.rights, strict=True):
            total = total + left @ vectors @ right.mT
        return total

    def trace(self) -> float:
        lefts, rights = (t.diagonal(dim1=1, dim2=2).double() for t in (self.lefts, self.rights))
        return (lefts.sum(1) @ rights.sum(1)).item()

    def scaled(self, factor: float) -> LowRankBlock:
        root = math.sqrt(factor)
        return replace(self, lefts=self.lefts * root, rights=self.rights * root)

    def damped(self, damping: Damping) -> DampedBlock:
        o, i = self.shape
        if o * i > EIGEN_LIMIT:
            wide = self.to(dtype=torch.float64)
            leading = DampedSpectrum(wide._leading(), replace(damping, method="exact"))
            dtype = torch.promote_types(self.dtype, torch.float32)
            return DampedLowRank(wide, leading, damping, dtype)
        values, vectors = symmetric_eigh(self.to_dense(), "the sum of Kronecker products")
        return DampedSpectrum(Spectrum(DenseBasis(vectors), values.view(o, i)), damping)

    def _leading(self) -> Spectrum:
        """Of the first term; a preconditioner, so what is negative of it may go."""
        left, right = (
            symmetric_eigh(factor, f"the first {side} factor")
            for factor, side in ((self.lefts[0], "left"), (self.rights[0], "right"))
        )
        values = [pair[0].clamp_min(0) for pair in (left, right)]
        return Spectrum.of_factors((values[0], left[1]), (values[1], right[1]))

    def inner(self, other: Block) -> float:
        terms = zip(self.lefts, self.rights, strict=True)
        return sum(other.inner_kronecker(left, right).item() for left, right in terms)

    def inner_kronecker(self, left: Tensor, right: Tensor) -> Tensor:
        terms = zip(self.lefts, self.rights, strict=True)
        return torch.stack([KroneckerBlock(*t).inner_kronecker(left, right) for t in terms]).sum()

    def diagonal_in(self, left: Tensor | None, right: Tensor | None) -> Tensor:
        terms = zip(self.lefts, self.rights, strict=True)
        return torch.stack([KroneckerBlock(*t).diagonal_in(left, right) for t in terms]).sum(0)


@dataclass(frozen=True)
class DampedLowRank(DampedBlock):
    """Solved with iteratively, with the damped leading product as preconditioner.

    In float64 throughout, whatever `dtype` vectors come in: in float32, rounding would make the
    smallest eigenvalues negative, and pass for indefinite. Conjugate gradients and Lanczos stop at
    a relative residual (change) of 2e-12, `eps ** 0.75`.
    """

    block: LowRankBlock
    leading: DampedSpectrum
    damping: Damping
    vector_dtype: torch.dtype

    @property
    def dtype(self) -> torch.dtype:
        return self.vector_dtype

    @property
    def shape(self) -> tuple[int, int]:
        return self.block.shape

    @property
    def device(self) -> torch.device:
        return self.block.lefts.device

    def power(self, vectors: Tensor, exponent: float) -> Tensor:
        flat = vectors.reshape(-1, *self.shape).double()
        if exponent == 1:
            product = self._times(flat)
        elif exponent == -1:
            product = iterative.conjugate_gradients(
                self._times, lambda v: self.leading.power(v, -1), flat
            )
        else:
            product = iterative.matrix_power(self._times, flat, exponent)
        return product.view(vectors.shape).to(vectors.dtype)

    def draw(self, noise: Tensor) -> Tensor:
        # P^-1/2 S^-1/2 z has the covariance P^-1/2 S^-1 P^-1/2 = B^-1, and S is near the identity.
        flat = noise.reshape(-1, *self.shape).double()
        whitened = iterative.matrix_power(self._whitened, flat, -0.5)
        return self.leading.power(whitened, -0.5).view(noise.shape).to(noise.dtype)

    def logdet(self) -> float:
        """Exact up to `CHOLESKY_LIMIT` parameters; beyond, by stochastic Lanczos quadrature.

        That estimates only what the leading product leaves of it, from 32 fixed probes.
        """
        return self._logdet

    @cached_property
    def _logdet(self) -> float:
        o, i = self.shape
        if o * i > CHOLESKY_LIMIT:
            rest = iterative.logdet(self._whitened, self.shape, self.block.lefts)
            return self.leading.logdet() + rest
        dense = self.block.to_dense() * self.damping.scale
        dense.diagonal().add_(self.damping.damping)
        root, failed = torch.linalg.cholesky_ex(dense)
        if failed:
            raise ValueError(iterative.INDEFINITE)
        return 2 * root.diagonal().log().sum().item()

    def redamped(self, damping: Damping) -> DampedLowRank:
        leading = self.leading.redamped(replace(damping, method="exact"))
        return DampedLowRank(self.block, leading, damping, self.vector_dtype)

    @property
    def _whitened(self) -> Callable[[Tensor], Tensor]:
        def times(vectors: Tensor) -> Tensor:
            return self.leading.power(self._times(self.leading.power(vectors, -0.5)), -0.5)

        return times

    def _times(self, vectors: Tensor) -> Tensor:
        return self.block.matvec(vectors) * self.damping.scale + self.damping.damping * vectors
