"""Sums of Kronecker products."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kfoc.blocks import sound
from kfoc.blocks.base import Block
from kfoc.blocks.decomposed import DecomposedBlock
from kfoc.blocks.kronecker import KroneckerBlock
from kfoc.blocks.spectrum import DenseBasis, Spectrum
from kfoc.linalg.eigen import symmetric_eigh

# Up to so many parameters a sum is solved with, by its dense eigendecomposition.
EIGEN_LIMIT = 1024


@dataclass(frozen=True)
class LowRankBlock(DecomposedBlock):
    """`sum_t kron(lefts[t], rights[t])`: rank r after the rearrangement of Lemma 3.1.

    The first term is positive semi-definite. The others are not, and **the sum may be indefinite**:
    it is closer to F than any single product, but the directions that F hardly knows can come out
    slightly negative. A damping that does not exceed them is refused.

    A sum of products has no factored inverse. Up to `EIGEN_LIMIT` parameters it is damped, and so
    solved with, by a dense eigendecomposition; beyond, `damped` refuses. `matvec`, norms, inner
    products and comparisons have no limit.

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

    def decomposed(self) -> dict[str, Tensor]:
        return {"": self.to_dense()}

    def decomposition(self) -> Spectrum:
        o, i = self.shape
        if o * i > EIGEN_LIMIT:
            raise ValueError(
                f"a sum of {self.rank} Kronecker products has no factored inverse, and with "
                f"{o} x {i} = {o * i} parameters it is too large for a dense one (at most "
                f"{EIGEN_LIMIT}): for solves, roots, determinants and samples fit "
                "kfoc.EigenCorrected(kfoc.KFOC()) (EK-FOC), or kfoc.KFOC() of rank=1"
            )
        values, vectors = symmetric_eigh(self.to_dense(), "the sum of Kronecker products")
        return Spectrum(DenseBasis(vectors), values.view(o, i))

    def inner(self, other: Block) -> float:
        terms = zip(self.lefts, self.rights, strict=True)
        return sum(other.inner_kronecker(left, right).item() for left, right in terms)

    def inner_kronecker(self, left: Tensor, right: Tensor) -> Tensor:
        terms = zip(self.lefts, self.rights, strict=True)
        return torch.stack([KroneckerBlock(*t).inner_kronecker(left, right) for t in terms]).sum()

    def diagonal_in(self, left: Tensor | None, right: Tensor | None) -> Tensor:
        terms = zip(self.lefts, self.rights, strict=True)
        return torch.stack([KroneckerBlock(*t).diagonal_in(left, right) for t in terms]).sum(0)
