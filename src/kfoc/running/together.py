"""A fit whose data lies with several ranks, in step from batch to batch.

The ranks must have the model and its layers in common. A rank may have no data, or none that
reaches some layer: it then learns from the others which layers have a block, and of what shape.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Iterable
from typing import Any

from kfoc.distributed import Ranks, RanksError
from kfoc.fitting.session import Session
from kfoc.model.batches import Present, mapped, moved
from kfoc.running.fingerprint import code_of, of_task
from kfoc.running.local import Alone, Unkept
from kfoc.running.progress import length


class Together(Alone):
    """The ranks of a group, as a fit has them."""

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks

    def check(self, session: Session, data: Iterable[Any], terms: dict[str, str]) -> Iterable[Any]:
        """All ranks must fit the same task: the same model, in the same mode, with the same layers.

        Whether they do is told by one number, and what is not the same is sent where it is not. A
        `predict` is held to its code alone, see `fingerprint.code_of`.

        Returns:
            The batches that have samples, but of a sharded model, whose ranks run every forward
            pass together: all, of which each must have as many.

        Raises:
            RanksError: on all ranks; the message names the first difference.
        """
        sharded, selection = session.reader.is_sharded, session.selection
        layers = {f"layer {name!r}": repr(selection.layout(name)) for name in selection.blocks}
        own = of_task(session) | layers | terms
        if sharded:
            own["batches in data"] = str(length(data))
        predict = session.task.predict
        own["predict"] = "None" if predict is None else f"a function {code_of(predict)}"
        del own["devices"]  # every rank has its own
        if not self.ranks.section(int(hashlib.sha256(repr(own).encode()).hexdigest()[:15], 16)):
            self._differ(own)
        return data if sharded else Present(data)

    def _differ(self, own: dict[str, str]) -> None:
        for rank, theirs in enumerate(self.ranks.objects(own)):
            names = [key for key in [*own, *theirs] if own.get(key) != theirs.get(key)]
            if names:
                name = names[0]
                raise RanksError(
                    f"rank {rank} has another fit than rank {self.ranks.rank}: {name} is "
                    f"{theirs.get(name, 'missing')} there and {own.get(name, 'missing')} here; all "
                    "ranks must pass the same options and the same model, in the same mode, and "
                    "data alone may differ (torch.distributed.broadcast its parameters and buffers "
                    "from one rank: DistributedDataParallel leaves each its own BatchNorm "
                    "statistics)"
                )

    def start(self) -> None:
        self.ranks.start()

    def take(self, session: Session, batch: Any, last: bool, keeper: Unkept) -> None:
        """Take in a batch, in step with the others: each sample has its number in all data."""
        # They take turns, were it one process.
        place = session.batches * self.ranks.world + self.ranks.rank
        self.ranks.asking = keeper.due(session, 1)
        session.take(batch, place=place, numbered=self.ranks.first_index)
        if self.ranks.asked:
            keeper.save(session)

    def end(self, session: Session, keeper: Unkept) -> int:
        """Wait for the ranks that have more data, and put together what all have collected."""
        self.ranks.asking = False
        while self.ranks.others_go_on():
            if self.ranks.asked:
                keeper.save(session)
        session.check_pass()
        if self.ranks.samples:
            self._agree(session)
            names = [n for n, layer in sorted(session.fitted.items()) if not layer.settled]
            states = [session.layers[name].state for name in names]
            self.ranks.pooled([state.pooled() for state in states if state is not None])
            if not session.passes:
                probes = [layer.probes for _, layer in sorted(session.layers.items())]
                self.ranks.pooled([each.pooled() for each in probes if each is not None])
        samples = self.ranks.samples
        self.ranks.start()
        return samples

    def union(self, names: set[str]) -> set[str]:
        return set().union(*self.ranks.objects(sorted(names)))

    def _agree(self, session: Session) -> None:
        """Have the states of the same layers on all ranks."""
        selection, own = session.selection, session.fitted
        known = sorted(own), sorted(selection.layers), sorted(selection.loose)
        if self.ranks.section(zlib.crc32(repr(known).encode())):
            return
        shapes = {name: mapped(layer.silent, lambda t: t.cpu()) for name, layer in own.items()}
        told = self.ranks.objects((shapes, known[1], selection.skipped))
        for rank, (_, treated, skipped) in enumerate(told):
            for name in sorted(selection.layers.keys() - set(treated)):
                if name in own:
                    raise ValueError(
                        f"layer {name!r}: rank {rank} found that it cannot be treated: "
                        f"{skipped.get(name, 'it is used in another way than its forward')}"
                    )
                reason = f"rank {rank} found that it has no treatment"
                selection.drop(name, skipped.get(name, reason))
        for rank, (theirs, _, _) in enumerate(told):
            for name in theirs:
                if name in session.fitted:
                    continue
                if name in selection.watched:  # a layer there, and no batch has shown it here
                    selection.promote([name])
                if name not in selection.blocks:
                    raise ValueError(
                        f"layer {name!r}: rank {rank} treats it, and here it was left out: "
                        f"{selection.skipped.get(name, 'its parameters are in another block')}"
                    )
                self._adopt(session, name, moved(theirs[name], session.task.model), rank)

    def _adopt(self, session: Session, name: str, silent: Any, rank: int) -> None:
        """Begin a layer that another rank's samples reached, and none of this one's."""
        if name in session.layers or session.meet(name, silent).state is None:
            raise ValueError(
                f"layer {name!r}: rank {rank} fits it in this sweep over the data, and here it "
                "waits for another: with memory_budget over several ranks, every rank's first "
                "batch must reach the same layers; leave out memory_budget, or give a larger one"
            )
