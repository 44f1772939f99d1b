"""The way to run a fit, by what `fit` is asked for: the one place that says what goes together."""

from __future__ import annotations

import os
from pathlib import Path

from kfoc.distributed import Ranks
from kfoc.running.by_layers import ByLayers
from kfoc.running.checkpointed import Checkpoint, Checkpointed
from kfoc.running.checkpointed_ranks import CheckpointedRanks
from kfoc.running.local import Alone, Local, Runner, Unkept
from kfoc.running.storage import Files
from kfoc.running.together import Together


def chosen(
    ranks: Ranks | None,
    checkpoint: Checkpoint | str | os.PathLike[str] | None,
    resume: bool,
    memory_budget: int | None,
    storage: str | Path | None,
) -> Runner:
    """The runner; arguments as those of `fit`.

    Raises:
        ValueError: options that make no sense. All of them go together.
    """
    if memory_budget is not None and (type(memory_budget) is not int or memory_budget < 1):
        raise ValueError(
            f"memory_budget must be a positive number of bytes, found {memory_budget!r}"
        )
    keeper = Unkept()
    if checkpoint is not None:
        own = checkpoint if isinstance(checkpoint, Checkpoint) else Checkpoint(checkpoint)
        own.check()
        groups = {} if memory_budget is None else {"memory_budget": str(memory_budget)}
        keeper = (
            CheckpointedRanks(own, resume, groups, ranks)
            if ranks
            else Checkpointed(own, resume, groups)
        )
    elif resume:
        raise ValueError("resume=True needs the checkpoint=... to go on from")
    local = Local(Together(ranks) if ranks else Alone(), keeper)
    if memory_budget is None and storage is None:
        return local
    return ByLayers(memory_budget, None if storage is None else Files(storage), local)
