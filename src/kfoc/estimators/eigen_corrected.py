"""Eigenvalue correction of any Kronecker-factored estimator."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from kfoc.blocks import Block, EigenBlock, KroneckerBlock, Report
from kfoc.errors import Footprint
from kfoc.estimators.base import State
from kfoc.estimators.diagonal import add_squares
from kfoc.estimators.factored import FactoredEstimator, factors_bytes
from kfoc.estimators.kfoc import KFOC
from kfoc.estimators.pooling import Pooling, Sum, summed
from kfoc.linalg.eigen import eigh
from kfoc.linalg.scaling import beyond, check_representable, magnitude
from kfoc.parameters.layout import Layout
from kfoc.samples.linear import Samples


@dataclass
class _State(State):
    """One layer: its base state until that is done, and then the eigenbasis and the sums."""

    base: State | None
    samples: int = 0  # in a pass
    basis: tuple[Tensor, Tensor] | None = None  # (o, o), (i, i)
    sums: Tensor | None = None  # (o, i)
    report: Report = field(default_factory=Report)
    vanished: bool = False  # a factor of the base is zero
    uncorrected: Block | None = None  # a base block without two eigenbases
    changed: float | None = None  # sigma, in the base's last pass

    def add(self, samples: Samples, alone: bool) -> None:
        if self.base is not None:
            self.base.add(samples, alone)
            self.samples += samples.num_samples
        elif self.basis is not None and self.sums is not None:
            add_squares(self.sums, samples, self.basis)

    def pooled(self) -> Pooling[None]:
        if self.base is None:
            yield [Sum([self.sums] if self.sums is not None else [])]
            return
        yield from self.base.pooled()
        (count,) = yield from summed(self.samples)
        self.samples = round(count)

    def next_pass(self) -> bool:
        if self.base is None:
            return True
        done = self.base.next_pass()
        self.changed = self.base.change()
        if not done:
            self.samples = 0
            return False
        block = self.base.block(self.samples)
        self.base = None  # its memory is not needed any more
        if not isinstance(block, KroneckerBlock) or block.right.ndim != 2:
            self.uncorrected = block
            return True
        largest = [magnitude(factor.diagonal()) for factor in (block.left, block.right)]
        for found in largest:
            check_representable(found, block.dtype, "its base's factor")
        self.vanished = not all(largest)
        _, left = eigh(block.left, "the left factor")
        _, right = eigh(block.right, "the right factor")
        report = block.report
        self.report = Report(
            steps=report.steps, converged=report.converged, plan=report.plan, gap=report.gap
        )
        self.basis = left.to(block.left.dtype), right.to(block.right.dtype)
        self.sums = torch.zeros_like(block.left[:, :1] * block.right[:1])
        return False

    def change(self) -> float | None:
        return self.changed

    def block(self, num_samples: float) -> Block:
        if self.uncorrected is not None:
            return self.uncorrected
        if self.basis is None or self.sums is None:
            raise ValueError("the eigenvalues take a pass over the data after the base's")
        if self.vanished and self.sums.any():
            raise ValueError(beyond("its base's factor", self.sums.dtype, "0"))
        return EigenBlock(*self.basis, self.sums / num_samples, report=self.report)


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

    def begin_one(self, layer: str, samples: Samples) -> State:
        return _State(self.base.begin_one(layer, samples))

    def footprint_one(self, samples: Samples) -> Footprint:
        base = self.base.footprint_one(samples)
        if samples.diagonal:
            return base
        # The eigenvectors, as large as the factors, and the eigenvalues.
        o, i = samples.shape
        size = factors_bytes(samples) + o * i * samples.grads.element_size()
        return Footprint(max(base.state, size), max(base.block, size))
