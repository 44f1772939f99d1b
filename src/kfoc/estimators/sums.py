"""The best sum of r Kronecker products, over any number of batches.

The leading r singular triples of the rearranged F. A data set that fits `buffer`, and any layer
whose F does, gets them exactly, in one pass; otherwise head and tail, as a single product, with a
head of more triples than are asked for. `"exact"` then takes a half step of the subspace iteration
over the whole data set per pass, until the sigmas settle.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from kfoc.blocks import Block, LowRankBlock
from kfoc.estimators.aggregation import iterated, last_change
from kfoc.estimators.online import Online
from kfoc.estimators.options import Options
from kfoc.estimators.pooling import Pooling, Sum
from kfoc.nearest.contraction import Contraction
from kfoc.nearest.pair import Pieces, symmetries
from kfoc.nearest.power import PowerIteration, Tolerance
from kfoc.nearest.subspace import (
    HalfSteps,
    Matrix,
    Singular,
    combined,
    leading,
    orthonormal,
    refined,
)
from kfoc.plans.explicit import Dense, output_first
from kfoc.samples.linear import Samples

# Half steps to a buffer's own triples, and their tolerance: what is left out of it costs more than
# their errors.
MERGE_STEPS = 12
MERGE_RTOL = 1e-3

# Of symmetric factors, and of antisymmetric ones.
SIGNS = 1, -1


@dataclass(frozen=True)
class SampleSteps(HalfSteps):
    """The half steps of a batch: `left = sum X right X^T` and `right = sum X^T left X`.

    The plans of `kfoc.plans` count on factors that are symmetric, and some on semi-definite ones;
    these make do with any.
    """

    samples: Samples
    memory_limit: int

    @property
    def symmetric(self) -> bool:  # type: ignore[override]
        return self.samples.num_positions <= 1

    @property
    def shape(self) -> tuple[int, int]:
        return self.samples.shape

    def to_left(self, rights: Tensor) -> Tensor:
        if self.samples.num_positions == 1:
            inputs = self._inputs
            weights = [((inputs @ right) * inputs).sum(1) for right in rights]
            return torch.stack([self._weighted(self._grads, w) for w in weights])
        o, _ = self.shape
        lefts = rights.new_zeros(len(rights), o, o)
        for gradients in self._chunks():  # (o, m, i)
            wide = gradients.flatten(1).mT
            for left, right in zip(lefts, rights, strict=True):
                left.addmm_((gradients @ right).flatten(1), wide)
        return lefts

    def to_right(self, lefts: Tensor) -> Tensor:
        if self.samples.num_positions == 1:
            grads = self._grads
            weights = [((grads @ left) * grads).sum(-1).sum(0) for left in lefts]
            return torch.stack([self._weighted(self._inputs[None], w) for w in weights])
        _o, i = self.shape
        rights = lefts.new_zeros(len(lefts), i, i)
        for gradients in self._chunks():
            rows = gradients.flatten(0, 1)
            for left, right in zip(lefts, rights, strict=True):
                right.addmm_(rows.mT, (left @ gradients.flatten(1)).view(-1, i))
        return rights

    @cached_property
    def _inputs(self) -> Tensor:
        """(N, i), for one position."""
        return self.samples.inputs.columns(0, self.samples.num_samples)[:, :, 0].mT

    @property
    def _grads(self) -> Tensor:
        """(S, N, o)."""
        return self.samples.grads[:, :, 0]

    @staticmethod
    def _weighted(vectors: Tensor, weights: Tensor) -> Tensor:
        """`sum_n weights_n sum_s v v^T` for vectors (S, N, n)."""
        rows = vectors.flatten(0, 1)
        return rows.mT @ (rows * weights.repeat(len(vectors))[:, None])

    def _chunks(self) -> Iterator[Tensor]:
        o, i = self.shape
        count = self.samples.num_samples * self.samples.num_directions * o * i
        if count * self.samples.grads.element_size() > self.memory_limit:
            return output_first(self.samples)
        return iter(self._kept)

    @cached_property
    def _kept(self) -> list[Tensor]:
        return list(output_first(self.samples))


class Sums(Online):
    """A head and a tail, of which several triples are wanted."""

    best: Pieces | None

    def __init__(self, config: Options, samples: Samples) -> None:
        super().__init__(config, samples)
        self.best = None  # the triples, where they are known

    @staticmethod
    def sums_fisher(config: Options, samples: Samples) -> bool:
        o, i = samples.shape
        return (o * i) ** 2 <= config.buffer

    def pieces(self, contraction: Contraction, rescaled: Samples | None) -> Pieces:
        """As `Online.pieces`, of factors of both symmetries: by the subspace iteration."""
        if rescaled is None:
            steps: HalfSteps = Matrix(contraction.matrix, self.shape)  # type: ignore[attr-defined]
        else:
            steps = SampleSteps(rescaled, self.config.memory_limit)
        count = self._head().size
        found = self._leading(steps, count, count + 2, MERGE_RTOL, MERGE_STEPS)
        rest = found.sigmas[count:].max().item() if len(found.sigmas) > count else 0.0
        return replace(_pieces(found, count), rest=rest)

    def _leading(
        self, steps: HalfSteps, rank: int, count: int, rtol: float | None, max_steps: int
    ) -> Singular:
        like = self.like.new_zeros(())
        return leading(steps, rank, count, rtol=rtol, max_steps=max_steps, like=like)

    def _solve(self, steps: HalfSteps, plan: str) -> None:
        """The optimum of what is at hand."""
        config = self.config
        found = self._leading(steps, config.rank, config.columns, config.rtol, config.max_steps)
        self.report = iterated(found, plan)
        self.best = _pieces(found, config.rank)

    def solve_alone(self, samples: Samples) -> None:
        rescaled, scale = samples.rescaled()
        self._weigh(samples, scale)
        self._solve(SampleSteps(rescaled, self.config.memory_limit), "samples")

    def solve_fisher(self, fisher: Tensor) -> None:
        self._solve(Matrix(Dense.of(fisher, self.shape).matrix, self.shape), "dense")

    def block(self, num_samples: float) -> Block:
        if self.best is None:
            self.close()
        best = self._head().leading(self.config.rank) if self.best is None else self.best
        if not len(best):  # F is zero
            left, right = (self.like.new_zeros(1, size, size) for size in self.shape)
            return LowRankBlock(left, right, report=self.report)
        # Sums of the same numbers, above and below the diagonal, may round differently.
        lefts, rights = (
            torch.stack([(f + sign * f.mT) / 2 for f, sign in zip(side, best.signs, strict=True)])
            for side in best.sides
        )
        found = Singular(lefts, rights, best.sigmas.to(lefts))
        lefts, rights = found.terms(self.config.rank, self.unit / num_samples)
        return LowRankBlock(lefts, rights, report=self.report)


class ExactSums(Sums):
    """After a pass of `Sums`, the subspace iteration, one half step per pass."""

    several_passes = True
    counts_batches = False

    power: PowerIteration | None
    counts: list[int]
    image: Tensor

    def __init__(self, config: Options, samples: Samples) -> None:
        super().__init__(config, samples)
        self.power = None  # of orthonormal factors (k, n, n), symmetric ones first
        self.counts = []  # how many are of either symmetry
        self.image = self.like  # of the factors that it asks for

    def absorb(self, samples: Samples) -> None:
        if self.power is None:
            super().absorb(samples)
            return
        rescaled, scale = samples.rescaled()
        steps = SampleSteps(rescaled, self.config.memory_limit)
        factors, side = self.power.ask()
        step = steps.to_right if side == "left" else steps.to_left
        self.image += step(factors) * (scale / (self.unit or 1.0))

    def pooled(self) -> Pooling[None]:
        if self.power is None:
            yield from super().pooled()
        else:
            self.flush()
            yield [Sum([self.image])]

    def next_pass(self) -> bool:
        """Prepare for another pass; True where none is needed."""
        config = self.config
        if self.power is None:
            self.close()
            if self.best is not None or self.head is None or config.passes == 1:
                if self.best is None and self.head is not None:
                    self.report = replace(self.report, converged=False)
                return True
            begun, self.head = self.head.leading(config.columns), None
            signs = torch.tensor(begun.signs)
            stacks = [orthonormal(begun.lefts[signs == sign], sign) for sign in SIGNS]
            self.counts = [len(stack) for stack in stacks]
            tolerance = Tolerance(config.rtol)
            self.power = PowerIteration("left", torch.cat(stacks), tolerance, config.passes - 1)
            self.image = torch.zeros_like(begun.rights)
            return not len(begun)
        self.flush()
        factors, side = self.power.ask()
        halves = factors.split(self.counts), self.image.split(self.counts)
        parts = [refined(*part) for part in zip(*halves, SIGNS, strict=True)]
        found = combined(parts, config.columns)
        self.best = _pieces(found if side == "left" else found.exchanged(), config.rank)
        norm = found.sigmas[: config.rank].norm().item()
        self.power.tell(torch.cat([part.rights for part in parts]), norm)
        self.report = iterated(self.power, "subspace")
        if not self.power.done:
            self.image = factors.zero_()
        return self.power.done

    def change(self) -> float | None:
        return last_change(self.power.sigmas if self.power else [])


def _pieces(found: Singular, count: int) -> Pieces:
    """The first triples, but for those that are zero."""
    kept = min(count, int((found.sigmas > 0).sum()))
    lefts = found.lefts[:kept]
    sigmas = found.sigmas[:kept].double().cpu()
    return Pieces(lefts, found.rights[:kept], sigmas, symmetries(lefts))
