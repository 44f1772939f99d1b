"""Stochastic power iteration over batches, and the exact one over passes."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kfoc.blocks import Report
from kfoc.estimators import over_ranks
from kfoc.estimators.aggregation import Aggregation
from kfoc.estimators.pooling import Pooling, Sum
from kfoc.linalg.products import mirrored
from kfoc.linalg.scaling import balance, norm_of
from kfoc.nearest.accelerated import fit_contraction
from kfoc.nearest.contraction import Contraction, Side, opposite
from kfoc.nearest.power import KroneckerFit, settled
from kfoc.pending import Pending
from kfoc.plans.choose import sums_densely
from kfoc.plans.cost import Size
from kfoc.plans.explicit import Dense, add_fisher
from kfoc.samples.linear import Samples

if TYPE_CHECKING:
    from kfoc.estimators.kfoc import KFOC

# Parts of a batch that `online` takes in one by one have so many samples at least: each costs some
# passes over the factors.
LEAST_PART = 256


class Online(Aggregation):
    """Stochastic power iteration, with one predicted half step and the scale of a sketch.

    `left_sum` collects `A_b r_b` and `right_sum` collects `A_b^T l_b` over batches b, where l_b
    and r_b are the normalised sums, including this batch's own contribution at the previous
    factors (the prediction): without it, a batch is weighted by directions that have never seen
    it, which on heavy-tailed gradients costs up to 0.1 of relative error.

    `core` collects `<A_b, l_b r_b^T>`. The sums are two sketches of A, and the rank-one
    approximation that they and the core determine is `left_sum right_sum^T / core` (a generalised
    Nystrom approximation): its scale is right to second order in the errors of l_b and r_b, where
    that of either sum alone is so to first order.
    """

    core: float
    norms: tuple[float, float]
    weight: float
    unit: float
    buffer: int
    pending: Pending
    single: KroneckerFit | None
    waits: bool
    taken: int
    until: int
    _latest: int
    fisher: Tensor | None

    def __init__(self, config: KFOC, samples: Samples) -> None:
        super().__init__(config, samples)
        self.core = 0.0
        self.norms = 0.0, 0.0  # of the sums, which are kept on and above the diagonal alone
        self.weight = 0.0  # samples in the sums, decayed as they are
        self.unit = 0.0  # the scale of all sums: they would overflow at extreme gradients
        self.buffer = 0 if config.decay else config.buffer
        self.pending = Pending(self.buffer)
        self.single = None
        self.waits = False  # with what is pending, until all ranks begin together (`over_ranks`)
        self.taken, self.until = 0, 0  # buffers since sums were exchanged, and when to do it again
        self._latest = 0  # numbers of the last batch
        self.fisher = None  # of layers small enough: F itself
        if not samples.diagonal and sums_densely(Size.of(samples), config.buffer):
            o, i = samples.shape
            self.fisher = samples.grads.new_zeros(o * i, o * i)

    def add(self, samples: Samples, alone: bool) -> None:
        if alone:
            self.single = self.solved_alone(samples)
            return
        self._latest = samples.numel
        if self.fisher is not None:
            rescaled, scale = samples.rescaled()
            self._weigh(samples, scale)
            add_fisher(self.fisher, rescaled, scale / (self.unit or 1.0))
            return
        if not self.waits:
            held = self.pending.numel
            if held + samples.numel > self.buffer or not self.pending.joins(samples):
                self.flush()
            if samples.numel > self.buffer:
                self.take(samples)
                return
        self.pending.add(samples)

    @property
    def due(self) -> bool:
        """Whether ranks should begin, another batch being too much to keep, or exchange sums."""
        if self.waits:
            return self.fisher is None and self.pending.numel + self._latest > self.buffer
        return self.taken >= self.until

    def flush(self) -> None:
        """Take in what is pending."""
        for samples in self.pending.taken():
            self.take(samples)

    def take(self, samples: Samples) -> None:
        """Absorb a batch, in parts where that is cheaper: inner products grow with its square."""
        self.taken += 1
        count, parts = samples.num_samples, 1
        if samples.num_positions == 1 and not self.config.decay:  # which counts batches
            o, i = samples.shape
            parts = math.ceil(count / max(LEAST_PART, (o * o + i * i) // (3 * (o + i))))
        part = math.ceil(count / parts) if count else 1
        for start in range(0, count, part):
            self.absorb(samples.part(start, start + part))

    def close(self) -> None:
        """Take in what is pending at the end; if that is all there was, it is the optimum."""
        if self.fisher is not None and self.weight and self.single is None:
            contraction = Dense.of(self.fisher, self.shape)
            self.single = self._alone(
                fit_contraction(
                    contraction,
                    rtol=self.config.rtol,
                    max_steps=self.config.max_steps,
                    scale=self.unit / self.weight,
                )
            )
        if not self.weight and self.pending.parts:
            (samples,) = self.pending.taken()
            self.single = self.solved_alone(samples)
        self.flush()

    def absorb(self, samples: Samples) -> None:
        contraction, scale = self.config.contraction(samples)
        self.report = replace(self.report, plan=contraction.plan)
        self._weigh(samples, scale)
        self._step(contraction, scale / (self.unit or 1.0))

    def _weigh(self, samples: Samples, scale: float) -> None:
        """Make room for one more batch: the decay, and the scale that all sums are in."""
        decay = self.config.decay or 1.0
        self.rescale(scale, decay)
        self.weight = decay * self.weight + samples.num_samples

    def rescale(self, scale: float, decay: float) -> None:
        unit = max(self.unit, scale)
        if not unit:  # zeros alone, so far
            return
        factor = decay * self.unit / unit
        if self.fisher is not None:
            self.fisher *= factor
        elif factor != 1.0:
            self.left *= factor
            self.right *= factor
            self.core *= factor
            self.norms = self.norms[0] * factor, self.norms[1] * factor
        self.unit = unit

    def _step(self, contraction: Contraction, c: float) -> None:
        """Add this batch, whose part of A is `c` times the contraction.

        A is linear, so the corrected half steps are combinations of those from the sums and from
        the predictions: the factors are formed once, at the end.
        """
        left, right, (left_norm, right_norm) = self.left, self.right, self.norms
        if not contraction.reads_upper:
            mirrored(left)
            mirrored(right)
        if left_norm and right_norm:
            w = contraction.apply(right, "right") / right_norm  # A r, a left representation
            v = contraction.apply(left, "left") / left_norm  # A^T l, a right representation
        else:
            w, v = _started(contraction)
        left_image, right_image = v * left_norm, w * right_norm

        # The norms of the predictions `sum + c * step`, without forming the steps' factors. A
        # batch without any gradient, met first, has none: it then divides zeros by one.
        squared = right_norm**2
        squared += 2 * c * contraction.overlap(v, right, right_image, "right").item()
        squared += c * c * contraction.inner(v, v, "right").item()
        right_after = math.sqrt(max(squared, 0.0)) or 1.0
        w_after = (right_image + contraction.advance(v, "right") * c) / right_after

        squared = left_norm**2
        squared += 2 * c * contraction.overlap(w, left, left_image, "left").item()
        squared += c * c * contraction.inner(w, w, "left").item()
        left_after = math.sqrt(max(squared, 0.0)) or 1.0
        v_after = (left_image + contraction.advance(w, "left") * c) / left_after

        # Before anything asks for another image, which the plans keep the last of alone.
        core = c * c * contraction.inner(w_after, w, "left").item()
        left_overlap = c * contraction.overlap(w_after, left, left_image, "left").item()
        self.core += (core + left_overlap) / left_after
        squared = left_norm**2 + 2 * left_overlap
        squared += c * c * contraction.inner(w_after, w_after, "left").item()
        left_norm = math.sqrt(max(squared, 0.0))
        squared = right_norm**2
        squared += 2 * c * contraction.overlap(v_after, right, right_image, "right").item()
        squared += c * c * contraction.inner(v_after, v_after, "right").item()
        self.norms = left_norm, math.sqrt(max(squared, 0.0))
        contraction.accumulate(left, w_after, "left", c)
        contraction.accumulate(right, v_after, "right", c)

    def pooled(self) -> Pooling[None]:
        yield from over_ranks.pooled(self)

    def decay(self, factor: float) -> None:
        self.flush()
        if self.unit:
            self.rescale(0.0, factor)
        self.weight *= factor

    def result(self, num_samples: float) -> tuple[Tensor, Tensor]:
        self.close()
        if self.single is not None:
            return self.single.left, self.single.right
        left, right = mirrored(self.left), mirrored(self.right)
        if not self.core:
            return left, right
        norms = norm_of(left) * norm_of(right)
        return balance(left, right, norms / self.core * self.unit / self.weight)


def _started(contraction: Contraction) -> tuple[Tensor, Tensor]:
    """The first batch's `A r` and `A^T l`, one full step from the deterministic start."""
    start = contraction.start()
    v = contraction.advance(start, "left")
    norm = math.sqrt(max(contraction.inner(v, v, "right").item(), 0.0)) or 1.0
    return contraction.advance(v, "right") / norm, v / norm


class Exact(Online):
    """The power iteration over the whole data set, one half step per pass, after an online pass."""

    side: Side | None
    sigmas: list[float]

    def __init__(self, config: KFOC, samples: Samples) -> None:
        super().__init__(config, samples)
        self.side = None  # of the factor that is held fixed in this pass
        self.sigmas = []

    def absorb(self, samples: Samples) -> None:
        if self.side is None:
            super().absorb(samples)
            return
        contraction, scale = self.config.contraction(samples)
        fixed, image = self._factors(self.side)
        step = contraction.apply(fixed, self.side)
        contraction.accumulate(image, step, opposite(self.side), scale / (self.unit or 1.0))

    @property
    def due(self) -> bool:
        """After the first pass the image alone is summed, at the end of each."""
        return self.side is None and super().due

    def pooled(self) -> Pooling[None]:
        if self.side is None:
            yield from super().pooled()
        else:
            self.flush()
            _, image = self._factors(self.side)
            yield [Sum([mirrored(image)])]

    def next_pass(self) -> bool:
        self.close()
        if self.single is not None or (self.side is None and not self.core):
            return True
        if self.config.passes == 1:  # the estimate of that pass is all there will be
            self.report = replace(self.report, converged=False)
            return True
        if self.side is None:
            mirrored(self.left)
            self.left /= self.left.norm()
            self._fix("left")
            return False
        _, image = self._factors(self.side)
        mirrored(image)
        self.sigmas.append(norm_of(image))
        precision = 4 * torch.finfo(image.dtype).eps
        converged = settled(self.sigmas, self.config.rtol, precision)
        plan = self.report.plan
        self.report = Report(None, None, len(self.sigmas), converged, plan)
        if not converged and len(self.sigmas) + 1 < self.config.passes:
            image /= self.sigmas[-1] or 1.0
            self._fix(opposite(self.side))
            return False
        return True

    def _factors(self, side: Side) -> tuple[Tensor, Tensor]:
        return (self.left, self.right) if side == "left" else (self.right, self.left)

    def _fix(self, side: Side) -> None:
        self.side = side
        self._factors(side)[1].zero_()

    def result(self, num_samples: float) -> tuple[Tensor, Tensor]:
        if not self.sigmas:
            return super().result(num_samples)
        return balance(self.left, self.right, self.sigmas[-1] * self.unit / num_samples)
