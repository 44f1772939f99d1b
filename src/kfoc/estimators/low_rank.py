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
from kfoc.kronecker import Side, opposite, settled
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
    leading_of,
    matrices,
    refined,
)

# Half steps on the first buffer, whose triples are test matrices and need not be accurate.
FIRST_STEPS = 12


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
        self.fixed: list[Sketch | Fixed] = []
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
            self.found = self._close()
            # Without sketches all data was at hand, and the triples are final.
            if not self.fixed or self.config.aggregation != "exact":
                return True
            self.fixed = [sketch.begin() for sketch in self.fixed if isinstance(sketch, Sketch)]
            return False
        passes = [fixed for fixed in self.fixed if isinstance(fixed, Fixed)]
        found = combined([fixed.refined() for fixed in passes], self.count)
        self.norms.append(found.sigmas[: self.config.rank].norm().item())
        precision = 4 * torch.finfo(self.like.dtype).eps
        converged = not self.norms[-1] or settled(self.norms, self.config.rtol, precision)
        steps = len(self.norms)
        self.found = found if passes[0].side == "left" else found.exchanged()
        self.report = Report(steps=steps, converged=converged, plan="subspace")
        if converged or steps + 1 >= self.config.passes:
            return True
        self.fixed = [fixed.turned() for fixed in passes]
        return False

    def block(self, num_samples: int) -> LowRankBlock:
        found = self._close() if self.found is None else self.found
        lefts, rights = found.terms(self.config.rank, self.unit / num_samples)
        return LowRankBlock(lefts, rights, report=self.report)

    def _close(self) -> Singular:
        """Triples of what the first pass collected."""
        if self.fisher is not None:
            o, i = self.shape
            matrix = mirrored(self.fisher).view(o, i, o, i).transpose(1, 2).reshape(o * o, i * i)
            return self._solved(Matrix(matrix, self.shape))
        if self.fixed:
            self.report = Report(plan="sketch")
            sketches = [sketch for sketch in self.fixed if isinstance(sketch, Sketch)]
            return combined([sketch.joined() for sketch in sketches], self.count)
        return self._solved(self._pending_steps())

    def _pending_steps(self) -> HalfSteps:
        """The half steps of all pending samples, in `unit`."""
        pending, self.pending = _merged(self.pending), []
        rescaled = [samples.rescaled() for samples in pending]
        for _, scale in rescaled:
            self._rescale(scale)
        limit = self.config.memory_limit // max(1, len(rescaled))
        parts = [(SampleSteps(part, limit), scale / self.unit) for part, scale in rescaled]
        return _Weighted(parts)

    def _solved(self, steps: HalfSteps) -> Singular:
        found = leading(
            steps,
            self.config.rank,
            self.count,
            rtol=self.config.rtol,
            max_steps=self.config.max_steps,
            like=self.like,
        )
        plan = "dense" if isinstance(steps, Matrix) else "samples"
        self.report = Report(steps=found.steps, converged=found.converged, plan=plan)
        return found

    def _begin(self) -> None:
        """Test matrices from the samples so far, which are then the first of the sums."""
        steps = self._pending_steps()
        for sign in (1,) if steps.symmetric else (1, -1):
            found = leading_of(
                steps,
                sign,
                self.config.rank,
                self.count,
                rtol=max(self.config.rtol, 1e-4),
                max_steps=FIRST_STEPS,
                like=self.like,
            )
            if found is None:
                continue
            columns = len(found.lefts)
            # As many as there are directions at all make the sketch exact.
            fewer = columns if columns < self.count else columns * 2 // 3
            sketch = Sketch(sign, found.lefts, found.rights[:fewer])
            sketch.add(steps, 1.0)
            self.fixed.append(sketch)

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


@dataclass
class Sketch:
    """`A rights` and `A^T lefts` for fixed test matrices."""

    sign: int
    lefts: Tensor  # (l, o, o), orthonormal
    rights: Tensor  # (k, i, i), orthonormal; fewer, so that the small inverse is well-conditioned

    def __post_init__(self) -> None:
        o, i = self.lefts.shape[-1], self.rights.shape[-1]
        self.left_sum = self.lefts.new_zeros(len(self.rights), o, o)
        self.right_sum = self.lefts.new_zeros(len(self.lefts), i, i)

    def add(self, steps: HalfSteps, scale: float) -> None:
        self.left_sum += steps.to_left(self.rights) * scale
        self.right_sum += steps.to_right(self.lefts) * scale

    def rescale(self, factor: float) -> None:
        self.left_sum *= factor
        self.right_sum *= factor

    def begin(self) -> Fixed:
        """The first half step of the iteration proper."""
        lefts = self.joined().lefts
        image = torch.zeros_like(self.right_sum[: len(lefts)])
        return Fixed(self.sign, "left", lefts, image)

    def joined(self) -> Singular:
        """Of `A ~ Q (lefts^T Q)^+ (A^T lefts)^T`, with Q the orthonormal basis of `A rights`."""
        sign = self.sign
        basis = torch.linalg.qr(coordinates(self.left_sum, sign))[0]
        core = torch.linalg.pinv(coordinates(self.lefts, sign).mT @ basis)  # (k, l)
        images = coordinates(self.right_sum, sign) @ core.mT
        o, i = self.lefts.shape[-1], self.rights.shape[-1]
        return refined(matrices(basis, o, sign), matrices(images, i, sign), sign)


@dataclass
class Fixed:
    """The half step from orthonormal factors on one side."""

    sign: int
    side: Side
    factors: Tensor  # (k, n, n)
    image: Tensor  # (k, m, m)

    def add(self, steps: HalfSteps, scale: float) -> None:
        step = steps.to_right if self.side == "left" else steps.to_left
        self.image += step(self.factors) * scale

    def rescale(self, factor: float) -> None:
        self.image *= factor

    def refined(self) -> Singular:
        """The triples, with this side's factors as `lefts`."""
        return refined(self.factors, self.image, self.sign)

    def turned(self) -> Fixed:
        """The next half step, back from the image."""
        image = self.refined().rights
        return Fixed(self.sign, opposite(self.side), image, torch.zeros_like(self.factors))


@dataclass(frozen=True)
class _Weighted(HalfSteps):
    """A sum of operators, each with a weight."""

    parts: list[tuple[SampleSteps, float]]

    @property
    def symmetric(self) -> bool:  # type: ignore[override]
        return all(part.symmetric for part, _ in self.parts)

    @property
    def shape(self) -> tuple[int, int]:
        return self.parts[0][0].shape

    def to_left(self, rights: Tensor) -> Tensor:
        return torch.stack([part.to_left(rights) * scale for part, scale in self.parts]).sum(0)

    def to_right(self, lefts: Tensor) -> Tensor:
        return torch.stack([part.to_right(lefts) * scale for part, scale in self.parts]).sum(0)


def _merged(pending: list[Samples]) -> list[Samples]:
    """Batches that can be one, as one."""
    groups: list[list[Samples]] = []
    for samples in pending:
        if groups and groups[-1][0].joins(samples):
            groups[-1].append(samples)
        else:
            groups.append([samples])
    return [Samples.merged(group) for group in groups]
