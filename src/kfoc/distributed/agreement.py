"""What the ranks of a distributed fit must have in common: the model, its layers, and their states.

A rank may have no data, or none that reaches some layer. It then learns from the others which
layers have a block, and of what shape.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Mapping
from typing import Protocol

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from kfoc.distributed import Ranks, RanksError
from kfoc.estimators import Estimator
from kfoc.estimators.base import State
from kfoc.estimators.certificate import Probes
from kfoc.model.batches import mapped, moved
from kfoc.running.checkpointed import Run as Saved
from kfoc.running.checkpointed import fingerprint
from kfoc.running.fingerprint import code_of
from kfoc.samples.base import LayerSamples


class Run(Saved, Protocol):
    """What of a fit is read and written here."""

    estimator: Estimator
    states: dict[str, State]
    shapes: dict[str, LayerSamples]
    probes: dict[str, Probes]
    settled: set[str]

    def adopt(self, name: str, silent: LayerSamples) -> None:
        """Begin a layer's state with this rank's samples so far, none of which reached it."""


def unwrapped(model: nn.Module) -> nn.Module:
    """The module that `DistributedDataParallel` holds: its layers go by their own names.

    Its forward pass, and with it the reduction of gradients, is not what a fit is about.
    """
    return model.module if isinstance(model, DistributedDataParallel) else model


def sharded(model: nn.Module) -> bool:
    """Whether parameters lie with several ranks (`fully_shard`), who then run forward together."""
    return any(hasattr(parameter, "device_mesh") for parameter in model.parameters())


def check_same(ranks: Ranks, run: Run, more: Mapping[str, str]) -> None:
    """All ranks must fit the same model, in the same mode, with the same layers and options.

    Whether they do is told by one number, and what is not the same is sent where it is not. A
    `predict` is held to its code alone, see `fingerprint.code_of`.

    Args:
        more: what else must be the same, in words.

    Raises:
        RanksError: on all ranks; the message names the first difference.
    """
    layers = {f"layer {name!r}": repr(run.selection.layout(name)) for name in run.selection.blocks}
    own = fingerprint(run) | layers | dict(more)
    own["predict"] = "None" if run.predict is None else f"a function {code_of(run.predict)}"
    del own["devices"]  # every rank has its own
    if ranks.section(int(hashlib.sha256(repr(own).encode()).hexdigest()[:15], 16)):
        return
    for rank, theirs in enumerate(ranks.objects(own)):
        names = [key for key in [*own, *theirs] if own.get(key) != theirs.get(key)]
        if names:
            name = names[0]
            raise RanksError(
                f"rank {rank} has another fit than rank {ranks.rank}: {name} is "
                f"{theirs.get(name, 'missing')} there and {own.get(name, 'missing')} here; all "
                "ranks must pass the same options and the same model, in the same mode, and data "
                "alone may differ (torch.distributed.broadcast its parameters and buffers from one "
                "rank: DistributedDataParallel leaves each its own BatchNorm statistics)"
            )


def pool(ranks: Ranks, run: Run) -> None:
    """Make the states of this rank's data those of all ranks', see `State.pooled`."""
    _agree(ranks, run)
    names = sorted(run.states.keys() - run.settled)
    ranks.pooled([run.states[name].pooled() for name in names])
    if not run.passes:
        ranks.pooled([run.probes[name].pooled() for name in sorted(run.probes)])


def _agree(ranks: Ranks, run: Run) -> None:
    """Have the states of the same layers on all ranks."""
    selection = run.selection
    known = sorted(run.states), sorted(selection.treatments), sorted(selection.loose)
    if ranks.section(zlib.crc32(repr(known).encode())):
        return
    shapes = {name: mapped(run.shapes[name], lambda t: t.cpu()) for name in run.states}
    told = ranks.objects((shapes, known[1], selection.skipped))
    for rank, (_, treated, skipped) in enumerate(told):
        for name in sorted(selection.treatments.keys() - set(treated)):
            if name in run.states:
                raise ValueError(
                    f"layer {name!r}: rank {rank} found that it cannot be treated: "
                    f"{skipped.get(name, 'it is used in another way than its forward')}"
                )
            selection.drop(name, skipped.get(name, f"rank {rank} found that it has no treatment"))
    for rank, (theirs, _, _) in enumerate(told):
        for name in theirs:
            if name in run.states:
                continue
            if name in selection.watched:  # a layer there, and no batch has shown it here
                selection.promote([name])
            if name not in selection.blocks:
                raise ValueError(
                    f"layer {name!r}: rank {rank} treats it, and here it was left out: "
                    f"{selection.skipped.get(name, 'its parameters are in another block')}"
                )
            run.adopt(name, moved(theirs[name], run.model))
