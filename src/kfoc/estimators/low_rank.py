"""The best sum of r Kronecker products, over any number of batches.

The leading r singular triples of the rearranged F. A data set that fits `buffer`, and any layer
whose F does, gets them exactly, in one pass. Otherwise:

- `"online"`: the triples of the first buffer give fixed test matrices, and one pass collects the
  two sketches `A rights` and `A^T lefts`; a generalised Nystrom approximation (Nakatsukasa 2020)
  joins them. Both are sums over samples, so that batches after the buffer need no order.
- `"exact"`: then one half step of the subspace iteration per pass, until the sigmas settle.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from kfoc.blocks import LowRankBlock, Report
from kfoc.kronecker import settled
from kfoc.plans import CHUNK, add_fisher
from kfoc.products import mirrored
from kfoc.samples import Samples, gradient_chunks
from kfoc.subspace import (
    HalfSteps,
    Matrix,
    Singular,
    combined,
    coordinates,
    leading,
    matrices,
    refined,
)


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
        o, i = self.shape
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


class LowRank:
    """The state of one layer."""

    def __init__(self, config: Config, samples: Samples) -> None:
        self.config = config
        self.shape = o, i = samples.shape
        self.report = Report()
        self.like = samples.grads.new_zeros(())
        self.unit = 0.0  # the scale of all sums, see `Samples.rescaled`
        self.pending: list[Samples] = []
        self.fisher: Tensor | None = None
        if (o * i) ** 2 <= config.buffer:
            self.fisher = samples.grads.new_zeros(o * i, o * i)
        self.found: Singular | None = None  # of the sums, in `unit`
        self.fixed: list[Fixed] = []
        self.norms: list[float] = []

    @property
    def count(self) -> int:
        """Columns of the subspaces: more than asked for, as they settle faster."""
        return 2 * self.config.rank + 4

    def add(self, samples: Samples, alone: bool) -> None:
        if self.fisher is not None:
            rescaled, scale = samples.rescaled()
            self._rescale(scale)
            add_fisher(self.fisher, rescaled, scale / self.unit)
        elif self.fixed:
            self._absorb(samples)
        else:
            self.pending.append(samples if alone else samples.detached_copy())
            if sum(part.numel for part in self.pending) > self.config.buffer and not alone:
                self._begin()

    def next_pass(self) -> bool:
        """Prepare for another pass; True where none is needed."""
        if self.found is None:
            self._close()
            # Without sketches all data was at hand, and the triples are final.
            if not self.fixed or self.config.aggregation != "exact":
                return True
            self._fix_lefts()
            return False
        found = combined([fixed.refined() for fixed in self.fixed], self.count)
        self.norms.append(found.sigmas[: self.config.rank].norm().item())
        precision = 4 * torch.finfo(self.like.dtype).eps
        converged = not self.norms[-1] or settled(self.norms, self.config.rtol, precision)
        steps = len(self.norms)
        self.found = found if self.fixed[0].side == "left" else _exchanged(found)
        self.report = Report(steps=steps, converged=converged, plan="subspace")
        if converged or steps + 1 >= self.config.passes:
            return True
        self.fixed = [fixed.turned() for fixed in self.fixed]
        return False

    def block(self, num_samples: int) -> LowRankBlock:
        if self.found is None:
            self._close()
        assert self.found is not None
        lefts, rights = self.found.terms(self.config.rank, self.unit / num_samples)
        return LowRankBlock(lefts, rights, report=self.report)

    def _close(self) -> None:
        """Triples of what the first pass collected."""
        if self.fisher is not None:
            o, i = self.shape
            matrix = mirrored(self.fisher).view(o, i, o, i).transpose(1, 2).reshape(o * o, i * i)
            self.found = self._solved(Matrix(matrix, self.shape))
            self.fisher = None
        elif self.fixed:
            found = [sketch.joined() for sketch in self.fixed if isinstance(sketch, Sketch)]
            self.found = combined(found, self.count)
            self.report = Report(plan="sketch")
        else:
            self.found = self._solved(self._pending_steps())

    def _pending_steps(self) -> HalfSteps:
        """The half steps of all pending samples, in `unit`."""
        pending, self.pending = _joined(self.pending), []
        rescaled = [samples.rescaled() for samples in pending]
        for _, scale in rescaled:
            self._rescale(scale)
        limit = self.config.memory_limit // max(1, len(rescaled))
        parts = [(SampleSteps(part, limit), scale / self.unit) for part, scale in rescaled]
        return _Sum(parts)

    def _solved(self, steps: HalfSteps) -> Singular:
        found = leading(
            steps,
            self.config.rank,
            self.count,
            rtol=self.config.rtol,
            max_steps=self.config.max_steps,
            like=self.like,
        )
        plan = "dense" if isinstance(steps, Matrix) else "gradients"
        self.report = Report(steps=found.steps, converged=found.converged, plan=plan)
        return found

    def _begin(self) -> None:
        """Test matrices from the samples so far, which are then the first of the sums."""
        steps = self._pending_steps()
        for sign in (1,) if steps.symmetric and not self._positions_may_come(steps) else (1, -1):
            self.fixed.append(Sketch.begun(steps, self.config, self.count, sign, self.like))

    @staticmethod
    def _positions_may_come(steps: HalfSteps) -> bool:
        return not (isinstance(steps, _Sum) and steps.one_position)

    def _absorb(self, samples: Samples) -> None:
        rescaled, scale = samples.rescaled()
        self._rescale(scale)
        steps = SampleSteps(rescaled, self.config.memory_limit)
        for fixed in self.fixed:
            fixed.add(steps, scale / self.unit)

    def _rescale(self, scale: float) -> None:
        unit = max(self.unit, scale)
        if self.unit and unit != self.unit:
            factor = self.unit / unit
            if self.fisher is not None:
                self.fisher *= factor
            for fixed in self.fixed:
                fixed.rescale(factor)
        self.unit = unit

    def _fix_lefts(self) -> None: ...
