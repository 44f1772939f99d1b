"""Eigenvalue correction of any Kronecker-factored estimator."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from kfoc.blocks import Block, EigenBlock, KroneckerBlock, Report
from kfoc.errors import Footprint
from kfoc.estimators.factored import FactoredEstimator, factors_bytes
from kfoc.estimators.kfoc import KFOC
from kfoc.estimators.pooling import Pooling, Sum, summed
from kfoc.linalg.eigen import eigh
from kfoc.linalg.scaling import beyond, check_representable, magnitude
from kfoc.parameters.layout import Layout
from kfoc.plans.base import CHUNK
from kfoc.samples.base import gradient_chunks
from kfoc.samples.linear import Samples


@dataclass
class _State:
    """One layer: its base state until that is done, and then the eigenbasis and the sums."""

    base: Any
    samples: int = 0  # in a pass
    basis: tuple[Tensor, Tensor] | None = None  # (o, o), (i, i)
    sums: Tensor | None = None  # (o, i)
    report: Report = field(default_factory=Report)
    vanished: bool = False  # a factor of the base is zero
    uncorrected: Block | None = None  # a base block without two eigenbases
    change: float | None = None  # of sigma in the base's last pass


@dataclass(frozen=True)
class EigenCorrected(FactoredEstimator):
    """The best diagonal in the eigenbasis of a Kronecker-factored estimate.

    With U and V the eigenvectors of the base's factors, `eigenvalues = mean (U^T X V)^2` over the
    per-sample gradients X: among all blocks with these eigenvectors, the closest to F in Frobenius
    norm, and so never farther than the base itself (George et al. 2018, EKFAC, for `KFAC`). It
    takes one more pass over the same data than the base. Layers to which the base gives no product
    of two dense factors (normalisation layers, large embeddings) keep the base's block.

    `fit(..., probes=16)` puts the relative error of every block into its report: fits of `KFAC()`,
    `KFOC()` and both eigen-corrected, compared by it, say which is the closest for each layer.

    Attributes:
        base: KFOC() by default; KFAC() gives EKFAC. KFOC of a rank above 1 has no eigenbasis.
    """

    base: FactoredEstimator = field(default_factory=KFOC)

    def check(self) -> None:
        if not isinstance(self.base, FactoredEstimator) or isinstance(self.base, EigenCorrected):
            raise ValueError(
                f"base must be a Kronecker-factored estimator such as kfoc.KFOC() or kfoc.KFAC(), "
                f"found {self.base!r}"
            )
        self.base.check()
        if isinstance(self.base, KFOC) and self.base.rank > 1:
            raise ValueError(
                f"base must have rank 1, found {self.base}: a sum of Kronecker products has no "
                "factored eigenbasis"
            )

    @property
    def pass_limit(self) -> int:
        return self.base.pass_limit + 1

    def sized(self, layouts: Mapping[str, Layout]) -> EigenCorrected:
        base = self.base.sized(layouts)
        return replace(self, base=base) if isinstance(base, FactoredEstimator) else self

    def init_one(self, layer: str, samples: Samples) -> _State:
        return _State(self.base.init_one(layer, samples))

    def update_one(self, state: _State, samples: Samples, *, alone: bool) -> _State:
        if state.basis is not None and state.sums is not None:
            add_squares(state.sums, samples, state.basis)
        else:
            state.base = self.base.update_one(state.base, samples, alone=alone)
            state.samples += samples.num_samples
        return state

    def pooled_one(self, state: _State) -> Pooling[_State]:
        if state.sums is not None:
            yield [Sum([state.sums])]
            return state
        state.base = yield from self.base.pooled_one(state.base)
        (count,) = yield from summed(state.samples)
        state.samples = round(count)
        return state

    def next_pass_one(self, state: _State) -> tuple[_State, bool]:
        if state.basis is not None or state.uncorrected is not None:
            return state, True
        state.base, done = self.base.next_pass_one(state.base)
        state.change = self.base.change_one(state.base)
        if not done:
            state.samples = 0
            return state, False
        block = self.base.finish_one(state.base, state.samples)
        if not isinstance(block, KroneckerBlock) or block.right.ndim != 2:
            state.uncorrected = block
            return state, True
        largest = [magnitude(factor.diagonal()) for factor in (block.left, block.right)]
        for found in largest:
            check_representable(found, block.dtype, "its base's factor")
        state.vanished = not all(largest)
        _, left = eigh(block.left, "the left factor")
        _, right = eigh(block.right, "the right factor")
        report = block.report
        state.report = Report(steps=report.steps, converged=report.converged, plan=report.plan)
        state.basis = left.to(block.left.dtype), right.to(block.right.dtype)
        state.sums = torch.zeros_like(block.left[:, :1] * block.right[:1])
        state.base = None  # its memory is not needed any more
        return state, False

    def footprint_one(self, samples: Samples) -> Footprint:
        base = self.base.footprint_one(samples)
        if samples.diagonal:
            return base
        # The eigenvectors, as large as the factors, and the eigenvalues.
        o, i = samples.shape
        size = factors_bytes(samples) + o * i * samples.grads.element_size()
        return Footprint(max(base.state, size), max(base.block, size))

    def change_one(self, state: _State) -> float | None:
        return state.change

    def finish_one(self, state: _State, num_samples: float) -> Block:
        if state.uncorrected is not None:
            return state.uncorrected
        if state.basis is None or state.sums is None:
            raise ValueError("the eigenvalues take a pass over the data after the base's")
        if state.vanished and state.sums.any():
            raise ValueError(beyond("its base's factor", state.sums.dtype, "0"))
        return EigenBlock(*state.basis, state.sums / num_samples, report=state.report)


def add_squares(total: Tensor, samples: Samples, basis: tuple[Tensor, Tensor]) -> None:
    """`total += sum_{s,n} (U^T X V)^2`, (o, i), entry by entry."""
    left, right = basis
    if samples.num_positions == 1:
        # X = g a^T: the square of U^T g (V^T a)^T is an outer product too, and X is not formed.
        rescaled, scale = samples.rescaled()  # their squares may leave the range that X^2 is in
        if scale <= torch.finfo(total.dtype).max:
            inputs = rescaled.inputs.columns(0, samples.num_samples)[:, :, 0].mT @ right
            grads = (rescaled.grads[:, :, 0] @ left).square().sum(0)
            total.addmm_(grads.mT, inputs.square(), alpha=scale)
            return
    for gradients in gradient_chunks(samples, CHUNK):
        total += (left.mT @ gradients @ right).square().sum((0, 1))
