"""What a KFOC is asked for, and how it solves one batch: all that aggregations know of it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from kfoc.errors import out_of_memory
from kfoc.estimators import single_output
from kfoc.nearest.accelerated import fit_contraction
from kfoc.nearest.contraction import Contraction
from kfoc.nearest.power import KroneckerFit, Tolerance
from kfoc.plans.choose import contract, sketch_rank
from kfoc.plans.cost import Size
from kfoc.plans.sketch import Sketchable, fit_from_sketch
from kfoc.samples.linear import Samples
from kfoc.samples.tied import Tied

# How many triples are kept where memory is no matter: with fewer, a stream of small batches that
# come sorted is farther from the optimum (docs/choosing.md).
HEAD = 4


@dataclass(frozen=True)
class Options:
    """The options of `KFOC`, which describes them."""

    aggregation: str = "online"
    rtol: float | None = None
    max_steps: int = 1000
    passes: int = 20
    decay: float | None = None
    buffer: int = 2**20
    memory_limit: int = 2**30
    plan: str | None = None
    rank: int = 1
    head: int | None = None
    head_memory: int = 2**30

    @property
    def head_size(self) -> int:
        """How many singular triples are kept between buffers."""
        if self.head is not None:
            return self.head
        return HEAD if self.rank == 1 else self.columns

    @property
    def columns(self) -> int:
        """Of the subspace iteration: more than the triples asked for, as they settle faster."""
        return 2 * self.rank + 4

    def solve(self, samples: Samples, *, certify: bool) -> KroneckerFit:
        """The optimum of one batch, of the mean over its samples.

        Where memory does not suffice for the planned contraction, by one that keeps nothing.
        """
        try:
            return self._solved(samples, certify)
        except (RuntimeError, MemoryError) as error:
            if self.plan or not self.memory_limit or not out_of_memory(error):
                raise
        return replace(self, memory_limit=0)._solved(samples, certify)

    def _solved(self, samples: Samples, certify: bool) -> KroneckerFit:
        if samples.shape[0] == 1 and not samples.diagonal and self.plan is None:
            return single_output.solved(samples)
        rescaled, scale = samples.rescaled()
        contraction = self.contraction(rescaled)
        rank = self._sketch_rank(samples, contraction)
        asked: dict[str, Any] = {"rtol": self.rtol, "max_steps": self.max_steps}
        asked |= {"certify": certify, "scale": scale / samples.num_samples}
        if rank and isinstance(contraction, Sketchable):
            return fit_from_sketch(contraction, samples.shape, rank, **asked)
        return fit_contraction(contraction, **asked)

    def _sketch_rank(self, samples: Samples, contraction: Contraction) -> int:
        """See `choose.sketch_rank`; 0 too where tolerance and steps leave no room for a start that
        is only nearly the optimum."""
        tight = Tolerance(self.rtol).under(1e-8)
        if tight or isinstance(samples, Tied) or samples.diagonal or self.max_steps < 20:
            return 0
        element_size = samples.grads.element_size()
        return sketch_rank(Size.of(samples), contraction.plan, self.memory_limit, element_size)

    def contraction(self, rescaled: Samples) -> Contraction:
        """The planned one, of samples whose magnitude is near one (`Samples.rescaled`)."""
        return contract(rescaled, self.memory_limit, self.plan)
