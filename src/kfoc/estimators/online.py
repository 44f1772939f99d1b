"""One pass over batches: the data set's closest product, within some thousandths, as it streams."""

from __future__ import annotations

import math
from dataclasses import replace

from torch import Tensor

from kfoc.estimators.aggregation import Aggregation
from kfoc.estimators.head import HalfSteps, Head
from kfoc.estimators.options import Options
from kfoc.estimators.pending import Pending
from kfoc.estimators.pooling import Pooling, Sum, summed
from kfoc.estimators.pooling import largest as largest_of
from kfoc.estimators.scaled import Scaled
from kfoc.linalg.products import mirrored
from kfoc.nearest.accelerated import fit_contraction
from kfoc.nearest.contraction import Contraction
from kfoc.nearest.krylov import leading_triples
from kfoc.nearest.pair import Pieces
from kfoc.plans.choose import sums_densely
from kfoc.plans.cost import Size
from kfoc.plans.explicit import Dense, add_fisher
from kfoc.samples.linear import Samples

# Parts of a batch that are taken in one by one have so many samples at least: each costs some
# passes over the factors.
LEAST_PART = 256

# A buffer's own triples: how many of them, and of how many left factors they are combinations.
TRIPLES = 2
LENGTH = 3


class Online(Scaled, Aggregation):
    """A head and a tail, of buffers of samples (`kfoc.estimators.head`).

    What fits the buffer gets its optimum, and so does a layer whose F is small enough to be summed.
    """

    keeps_head = True
    counts_batches = True

    weight: float
    unit: float
    pending: Pending
    fisher: Tensor | None
    head: Head | None

    def __init__(self, config: Options, samples: Samples) -> None:
        super().__init__(config, samples)
        self.weight = 0.0  # samples in the sums, decayed as they are
        self.unit = 0.0  # the scale of all sums: they would overflow at extreme gradients
        self.pending = Pending(0 if config.decay else config.buffer)
        self.head = None  # made when first needed: a single batch does without
        self.fisher = None  # of layers small enough: F itself
        if self.sums_fisher(config, samples):
            o, i = samples.shape
            self.fisher = samples.grads.new_zeros(o * i, o * i)

    @staticmethod
    def sums_fisher(config: Options, samples: Samples) -> bool:
        """Whether F itself is summed."""
        return not samples.diagonal and sums_densely(Size.of(samples), config.buffer)

    def add(self, samples: Samples, alone: bool) -> None:
        if alone:
            self.solve_alone(samples)
            return
        if self.fisher is not None:
            rescaled, scale = samples.rescaled()
            add_fisher(self.fisher, rescaled, self._weigh(samples, scale))
            return
        held, room = self.pending.numel, self.pending.room
        if held + samples.numel > room or not self.pending.joins(samples):
            self.flush()
        if samples.numel > room:
            self.take(samples)
        else:
            self.pending.add(samples)

    def flush(self) -> None:
        """Take in what is pending."""
        for samples in self.pending.taken():
            self.take(samples)

    def take(self, samples: Samples) -> None:
        """Absorb a batch, in parts where that is cheaper: inner products grow with its square."""
        count, parts = samples.num_samples, 1
        if samples.num_positions == 1 and not self.config.decay:  # which counts batches
            o, i = samples.shape
            parts = math.ceil(count / max(LEAST_PART, (o * o + i * i) // (o + i)))
        part = math.ceil(count / parts) if count else 1
        for start in range(0, count, part):
            self.absorb(samples.part(start, start + part))

    def absorb(self, samples: Samples) -> None:
        rescaled, scale = samples.rescaled()
        share = self._weigh(samples, scale)
        self._merge(self.config.contraction(rescaled), share, rescaled)

    def _merge(self, contraction: Contraction, scale: float, rescaled: Samples | None) -> None:
        """Add `scale` times a contraction, of samples or of F itself, to head and tail."""
        head = self._head()
        self.report = replace(self.report, plan=contraction.plan, head=head.size)
        new = self.pieces(contraction, rescaled)
        if len(new):
            head.add(new.scaled(scale), half_steps(contraction, scale))

    def pieces(self, contraction: Contraction, rescaled: Samples | None) -> Pieces:
        """Leading triples of a contraction, about."""
        # Forming them is most of a large layer's price. Where what is left out of buffers hardly
        # moves the best pair, the second of one would not either; if it does, the tail tells.
        found = leading_triples(contraction, 1 if self._head().quiet else TRIPLES, LENGTH)
        if not found.sigmas:
            return self._head().nothing
        nothing = self._head().nothing.sides
        lefts, rights = (side.new_zeros(len(found.sigmas), *side.shape[1:]) for side in nothing)
        for left, right, x, y in zip(lefts, rights, found.lefts, found.rights, strict=True):
            contraction.accumulate(left, x, "left", 1.0)
            contraction.accumulate(right, y, "right", 1.0)
            mirrored(left)
            mirrored(right)
        return Pieces.of(lefts, rights, found.sigmas, found.rest)

    def _head(self) -> Head:
        if self.head is None:
            shapes = (self.shape[0],) * 2, self.right_shape
            self.head = Head(self.config.head_size, True, shapes, self.like)
        return self.head

    def _weigh(self, samples: Samples, scale: float) -> float:
        """Make room for one more batch, decayed and scaled; what its numbers count."""
        if self.config.decay not in (None, 1.0):
            self._decay(self.config.decay)
        self.weight += samples.num_samples
        return self.room(scale)

    def scale(self, factor: float) -> None:
        if self.fisher is not None:
            self.fisher *= factor
        if self.head is not None:
            self.head.scale(factor)

    def decay(self, factor: float) -> None:
        self.flush()
        self._decay(factor)

    def _decay(self, factor: float) -> None:
        self.scale(factor)
        self.weight *= factor

    def close(self) -> None:
        """Take in what is pending at the end; if that is all there was, it is the optimum."""
        if self.fisher is not None and self.weight:
            self.solve_fisher(self.fisher)
        elif self.head is None and self.pending.parts:
            (samples,) = self.pending.taken()
            self.solve_alone(samples)
        else:
            self.flush()

    def solve_fisher(self, fisher: Tensor) -> None:
        """The result, of all samples' F."""
        rtol, max_steps = self.config.rtol, self.config.max_steps
        contraction, scale = Dense.of(fisher, self.shape), self.unit / self.weight
        self.settle(fit_contraction(contraction, rtol=rtol, max_steps=max_steps, scale=scale))

    def pooled(self) -> Pooling[None]:
        """F where every rank with data sums it, and otherwise heads and tails."""
        if self.config.decay is not None:
            raise ValueError(
                f"decay={self.config.decay} counts batches one after the other, and ranks have "
                "theirs at the same time: leave out decay or group=..."
            )
        seen = self.weight > 0 or self.pending.numel > 0
        dense, factored = yield from largest_of(
            self.fisher is not None, self.fisher is None and seen
        )
        if factored:
            if self.fisher is not None:  # an F, where others have factors, is a batch like any
                fisher, self.fisher = self.fisher, None
                self._merge(Dense.of(fisher, self.shape), 1.0, None)
            self.flush()
        elif dense and self.fisher is None:
            o, i = self.shape
            self.fisher = self.like.new_zeros(o * i, o * i)
            self.pending.taken()
        yield from self.in_common_units()
        (self.weight,) = yield from summed(self.weight)
        if factored:
            yield from self._head().pooled()
        elif self.fisher is not None:
            yield [Sum([self.fisher])]

    def result(self, num_samples: float) -> tuple[Tensor, Tensor]:
        self.close()
        if self.found is not None:
            return self.found
        return self.of_pair(self._head().leading(1), self.unit / (self.weight or 1.0))


def half_steps(contraction: Contraction, scale: float) -> HalfSteps:
    """Those of `scale` times a contraction."""

    def step(left: Tensor, right: Tensor, to_left: Tensor, to_right: Tensor, share: float) -> float:
        image, back = contraction.apply(right, "right"), contraction.apply(left, "left")
        core = contraction.overlap(image, left, back, "left").item()
        contraction.accumulate(to_left, image, "left", share * scale)
        contraction.accumulate(to_right, back, "right", share * scale)
        mirrored(to_left)
        mirrored(to_right)
        contraction.forget()
        return scale * core

    return step
