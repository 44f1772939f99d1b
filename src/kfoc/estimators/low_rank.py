"""The best sum of r Kronecker products, over any number of batches.

The leading r singular triples of the rearranged F. A data set that fits `buffer`, and any layer
whose F does, gets them exactly, in one pass. Otherwise:

- `"online"`: one pass. Each buffer is merged with the leading triples so far, of which more are
  kept than asked for, by a few steps of the subspace iteration on the two.
- `"exact"`: then one half step of the iteration over the whole data set per pass, until the sigmas
  settle.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from kfoc.blocks import LowRankBlock, Report
from kfoc.estimators.pooling import Gather, Pooling, Sum, largest
from kfoc.linalg.products import mirrored
from kfoc.nearest.contraction import Side, opposite
from kfoc.nearest.power import settled
from kfoc.pending import Pending
from kfoc.plans.base import CHUNK
from kfoc.plans.explicit import add_fisher
from kfoc.samples.base import gradient_chunks
from kfoc.samples.linear import Samples
from kfoc.subspace import HalfSteps, Matrix, Singular, Terms, Weighted, combined, leading, refined

# Half steps of a merge, and its tolerance: what is dropped then costs more than their errors.
MERGE_STEPS = 12
MERGE_RTOL = 1e-4


class Config(Protocol):
    """What of KFOC's options is read here."""

    @property
    def aggregation(self) -> str: ...
    @property
    def rank(self) -> int: ...
    @property
    def rtol(self) -> float: ...
    @property
    def max_steps(self) -> int: ...
    @property
    def passes(self) -> int: ...
    @property
    def buffer(self) -> int: ...
    @property
    def memory_limit(self) -> int: ...


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
            return self._formed()
        return iter(self._kept)

    @cached_property
    def _kept(self) -> list[Tensor]:
        return list(self._formed())

    def _formed(self) -> Iterator[Tensor]:
        for gradients in gradient_chunks(self.samples, CHUNK):
            yield gradients.flatten(0, 1).transpose(0, 1).contiguous()


def numbers_held(config: Config, samples: Samples) -> int:
    """An upper bound of the numbers that the state of a layer holds; `samples` are its first."""
    o, i = samples.shape
    # All columns of both sides; between the passes of "exact", those held fixed and their images.
    triples = (2 * config.rank + 4) * (o * o + i * i)
    triples *= 2 if config.aggregation == "exact" else 1
    weights = 2 * (2 * config.rank + 4)
    # A batch that is larger than the buffer is pending all the same.
    return triples + weights + max(config.buffer, samples.numel)


class LowRank:
    """The state of one layer."""

    # All that a state holds, and may hold where it is read from a file.
    config: Config
    shape: tuple[int, int]
    report: Report
    like: Tensor
    unit: float
    pending: Pending
    fisher: Tensor | None
    found: Singular | None
    fixed: list[Fixed]
    norms: list[float]

    def __init__(self, config: Config, samples: Samples) -> None:
        self.config = config
        self.shape = o, i = samples.shape
        self.report = Report()
        self.like = samples.grads.new_zeros(())
        self.unit = 0.0  # the scale of all sums, see `Samples.rescaled`
        self.pending = Pending(config.buffer)
        self.fisher = None
        if (o * i) ** 2 <= config.buffer:
            self.fisher = samples.grads.new_zeros(o * i, o * i)
        self.found = None  # of the sums, in `unit`
        self.fixed = []
        self.norms = []

    @property
    def count(self) -> int:
        """Columns of the subspaces: more than asked for, as they settle faster."""
        return 2 * self.config.rank + 4

    def add(self, samples: Samples, alone: bool) -> None:
        if self.fisher is not None:
            rescaled, scale = samples.rescaled()
            self._rescale(scale)
            add_fisher(self.fisher, rescaled, scale / (self.unit or 1.0))
            return
        if self.fixed:
            self._absorb(samples)
            return
        held = self.pending.numel
        if held and held + samples.numel > self.config.buffer:
            self.found = self._merged()
        if alone:
            self.pending.parts = [samples]
        else:
            self.pending.add(samples)

    def next_pass(self) -> bool:
        """Prepare for another pass; True where none is needed."""
        if not self.fixed:
            streamed = self.found is not None
            self.found = self._close()
            # Otherwise all data was at hand at once, and the triples are final.
            if not streamed or self.config.aggregation != "exact":
                return True
            self.fixed = Fixed.begin(self.found)
            return False
        found = combined([fixed.refined() for fixed in self.fixed], self.count)
        self.norms.append(found.sigmas[: self.config.rank].norm().item())
        precision = 4 * torch.finfo(self.like.dtype).eps
        converged = not self.norms[-1] or settled(self.norms, self.config.rtol, precision)
        steps = len(self.norms)
        self.found = found if self.fixed[0].side == "left" else found.exchanged()
        self.report = Report(steps=steps, converged=converged, plan="subspace")
        if converged or steps + 1 >= self.config.passes:
            return True
        self.fixed = [fixed.turned() for fixed in self.fixed]
        return False

    def pooled(self) -> Pooling[None]:
        """Take in the other ranks' data at the end of a pass."""
        if self.fixed:
            yield [Sum([fixed.image for fixed in self.fixed])]
            return
        if self.fisher is None and (self.pending.parts or self.found is not None):
            self.found = self._close()
        (unit,) = yield from largest(self.unit)
        self._rescale(unit)
        if self.fisher is not None:
            yield [Sum([self.fisher])]
            return
        gather = Gather(self._terms())
        yield [gather]
        # Each rank's by themselves: terms of both symmetries are told from those of one.
        parts = [(Terms(lefts, rights), 1.0) for lefts, rights in gather.found]
        self.found = self._solved(
            Weighted(parts), "merged", max(self.config.rtol, MERGE_RTOL), self.config.max_steps
        )

    def _terms(self) -> list[Tensor]:
        """The leading terms, (count, o, o) and (count, i, i), with zeros where there are fewer."""
        padded = [self.like.new_zeros(self.count, n, n) for n in self.shape]
        if self.found is not None:
            for whole, part in zip(padded, self.found.terms(self.count), strict=True):
                whole[: len(part)] = part
        return padded

    def block(self, num_samples: float) -> LowRankBlock:
        found = self._close() if self.found is None else self.found
        lefts, rights = found.terms(self.config.rank, self.unit / num_samples)
        return LowRankBlock(lefts, rights, report=self.report)

    def _close(self) -> Singular:
        """Triples of what the first pass collected."""
        if self.fisher is not None:
            o, i = self.shape
            matrix = mirrored(self.fisher).view(o, i, o, i).transpose(1, 2).reshape(o * o, i * i)
            dense = Matrix(matrix, self.shape)
            return self._solved(dense, "dense", self.config.rtol, self.config.max_steps)
        if self.found is None:
            steps = Weighted(self._taken())
            return self._solved(steps, "samples", self.config.rtol, self.config.max_steps)
        return self._merged() if self.pending.parts else self.found

    def _merged(self) -> Singular:
        """Triples of those so far and of what is pending."""
        parts = self._taken()
        if self.found is not None:
            parts.append((Terms(*self.found.terms(self.count)), 1.0))
        return self._solved(
            Weighted(parts), "merged", max(self.config.rtol, MERGE_RTOL), MERGE_STEPS
        )

    def _taken(self) -> list[tuple[HalfSteps, float]]:
        """The pending samples, no longer pending, with their weights in `unit`."""
        rescaled = [samples.rescaled() for samples in self.pending.taken()]
        for _, scale in rescaled:
            self._rescale(scale)
        limit = self.config.memory_limit // max(1, len(rescaled))
        return [(SampleSteps(part, limit), scale / (self.unit or 1.0)) for part, scale in rescaled]

    def _solved(self, steps: HalfSteps, plan: str, rtol: float, max_steps: int) -> Singular:
        found = leading(
            steps, self.config.rank, self.count, rtol=rtol, max_steps=max_steps, like=self.like
        )
        self.report = Report(steps=found.steps, converged=found.converged, plan=plan)
        return found

    def _absorb(self, samples: Samples) -> None:
        rescaled, scale = samples.rescaled()
        steps = SampleSteps(rescaled, self.config.memory_limit)
        for fixed in self.fixed:
            fixed.add(steps, scale / (self.unit or 1.0))

    def _rescale(self, scale: float) -> None:
        """Make room for a batch of this scale; after the first pass there is room for all."""
        unit = max(self.unit, scale)
        if self.unit and unit != self.unit:
            factor = self.unit / unit
            if self.fisher is not None:
                self.fisher *= factor
            if self.found is not None:
                self.found = replace(self.found, sigmas=self.found.sigmas * factor)
        self.unit = unit


@dataclass
class Fixed:
    """The half step from orthonormal factors on one side."""

    sign: int
    side: Side
    factors: Tensor  # (k, n, n)
    image: Tensor  # (k, m, m)

    @staticmethod
    def begin(found: Singular) -> list[Fixed]:
        """The first half step of the iteration proper, for each symmetry there is."""
        symmetric = (found.lefts * found.lefts.mT).sum((1, 2)) > 0
        chosen = [(1, symmetric), (-1, ~symmetric)]
        return [
            Fixed(sign, "left", found.lefts[which], torch.zeros_like(found.rights[which]))
            for sign, which in chosen
            if which.any()
        ]

    def add(self, steps: HalfSteps, scale: float) -> None:
        step = steps.to_right if self.side == "left" else steps.to_left
        self.image += step(self.factors) * scale

    def refined(self) -> Singular:
        """The triples, with this side's factors as `lefts`."""
        return refined(self.factors, self.image, self.sign)

    def turned(self) -> Fixed:
        """The next half step, back from the image."""
        image = self.refined().rights
        return Fixed(self.sign, opposite(self.side), image, torch.zeros_like(self.factors))
