"""Passes over the data that all see the same batches, and sums of them over ranks."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kfoc.common.ambient import as_called
from kfoc.common.threads import UNFUSED, seed_of, seeded
from kfoc.distributed import Ranks, RanksError
from kfoc.errors import advised, within
from kfoc.fisher.linearised import Linearised, Modes
from kfoc.fitting.marks import Mark
from kfoc.likelihoods.base import Likelihood, outer_products
from kfoc.linalg.scaling import finite
from kfoc.model.batches import Present, check_next_token, checked_outputs, unpacked
from kfoc.model.functional import Forward, concerning
from kfoc.model.undisturbed import undisturbed
from kfoc.running.progress import Meter, Report, length


@dataclass(frozen=True)
class Batch:
    """A batch's derivative, and the Fisher by its outputs.

    Attributes:
        map: J.
        weigh: the Fisher by the outputs times vectors (k, N, ...) over them.
        mark: what tells the batch from others.
    """

    map: Linearised
    weigh: Callable[[Tensor], Tensor]
    mark: Mark


@dataclass
class Passes:
    """The data, as often as it is read.

    Attributes:
        forward, likelihood, fisher, seed, report, ranks: of the Fisher.
        names: of the parameters.
        marks: what the first pass saw, one for each batch.
        num_samples: in it, over all ranks; 0 before it.
        modes: what the model does not allow.
    """

    forward: Forward
    names: tuple[str, ...]
    data: Iterable[Any]
    likelihood: Likelihood
    fisher: str
    seed: int
    report: Report | None
    ranks: Ranks | None
    marks: list[Mark] = field(default_factory=list)
    num_samples: int = 0
    modes: Modes = field(default_factory=Modes)

    @contextmanager
    def together(self, vectors: Tensor) -> Iterator[None]:
        """What is asked of all ranks: an error on one ends the others too.

        Raises:
            RanksError: the ranks have other parameters, vectors or options.
        """
        if self.ranks is None:
            yield
            return
        with self.ranks.telling():
            own = repr((self.names, tuple(vectors.shape), self.likelihood, self.fisher, self.seed))
            mark = zlib.crc32(own.encode())
            for value in (*self.forward.parameters(self.names).values(), vectors):
                raw = value.reshape(-1).contiguous().view(torch.uint8).cpu().numpy()
                mark = zlib.crc32(raw.tobytes(), mark)
            if not self.ranks.section(mark):
                raise RanksError(
                    "the ranks have other parameters, vectors, layers or options: data alone may "
                    "differ"
                )
            yield

    def average(
        self, total: Tensor, take: Callable[[Batch], None], number: int = 1, limit: int = 1
    ) -> None:
        """Let `take` add all batches to `total`, and divide that by the samples of all ranks.

        Args:
            number, limit: of this pass, for the progress.

        Raises:
            ValueError: other batches than in the first pass, or ones that do not fit; the message
                names the batch.
        """
        with undisturbed(list(self.forward.model.modules())), UNFUSED:
            count = self._through(take, number, limit)
        counts = torch.tensor([float(count)], dtype=torch.float64)
        if self.ranks:
            self.ranks.section()
            self.ranks.sum([total, counts])
        if not counts.item():
            raise ValueError("data has no batches")
        self.num_samples = int(counts.item())
        total /= self.num_samples

    def _through(self, take: Callable[[Batch], None], number: int, limit: int) -> int:
        """One pass; returns this rank's samples."""
        again = bool(self.num_samples)
        if not again:
            self.marks.clear()
        batches = len(self.marks) if again else length(self.data)
        meter = Meter(self.report, number, limit, batches, None) if self.report else None
        parameters = self.forward.parameters(self.names)
        count = index = 0
        upcoming = as_called(Present(self.data))
        item = next(upcoming, _END)
        while item is not _END:
            where = f"batch {index}"
            with within(where), concerning(where), advised("the model", _LESS_MEMORY):
                count += self._one(item, take, parameters, index, again)
            item, index = next(upcoming, _END), index + 1
            if meter:
                meter.show(index, count, last=item is _END)
        if index != len(self.marks):
            raise ValueError(
                f"data has {index} batches, and had {len(self.marks)} in the first pass: several "
                "passes need the same batches each time"
            )
        return count

    def _one(
        self,
        item: Any,
        take: Callable[[Batch], None],
        parameters: Mapping[str, Tensor],
        index: int,
        again: bool,
    ) -> int:
        """One batch; returns its samples."""
        batch = self._linearised(item, parameters, index)
        if not again:
            self.marks.append(batch.mark)
        elif index >= len(self.marks) or not self.marks[index].same(batch.mark):
            raise ValueError(
                "this pass does not see what the first one saw: several passes need the same "
                "batches each time (DataLoader: shuffle=False, no random augmentation), and a "
                "model that is not changed between them (after training, make a new kfoc.Fisher)"
            )
        take(batch)
        return len(batch.map.outputs)

    def _linearised(self, item: Any, parameters: Mapping[str, Tensor], index: int) -> Batch:
        check_next_token(self.forward.model, item, self.forward.predict)
        inputs, targets = (
            self.forward.moved(each) for each in unpacked(item, self.forward.predict)
        )
        # Dropout in train mode draws what it draws in `fit`.
        number = index * self.ranks.world + self.ranks.rank if self.ranks else index
        cuda = next(self.forward.model.parameters()).device.type == "cuda"
        drawn = partial(seeded, seed_of(self.seed, number), cuda)
        map = Linearised(self.forward, parameters, inputs, drawn, self.modes)
        outputs = checked_outputs(map.outputs, inputs).detach()
        if not finite(outputs):
            raise ValueError("the model's outputs are not finite")
        self.likelihood = self.likelihood.settled(outputs, targets)
        self.likelihood.check(outputs, targets, self.fisher)
        if self.fisher == "empirical":
            cotangent = self.likelihood.observed(outputs, targets)
            weigh = partial(outer_products, [cotangent])
        else:
            weigh = partial(self.likelihood.fisher_product, outputs, targets)
        mark = Mark.of_batch(outputs, targets, self.likelihood, self.fisher)
        return Batch(map, weigh, mark)


_END = object()
_LESS_MEMORY = "use smaller batches, or a smaller chunk_size"
