"""Forward and backward passes that leave the model and the process as they were."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from kfoc.common.threads import UNCOMPILED, random_state_kept
from kfoc.layers.rule import own_parameters
from kfoc.model.buffers import buffers_kept


@contextmanager
def undisturbed(modules: Collection[nn.Module]) -> Iterator[None]:
    """Gradients on and compilation off; afterwards all is as it was, random state and buffers too.

    A compiled region is one function, whose layers nobody can watch.

    Args:
        modules: all of the model's.
    """
    gpus = set()
    if torch.cuda.is_initialized():  # or no parameter can be there
        held = [p for module in modules for p in own_parameters(module).values()]
        gpus = {p.device.index or 0 for p in held if p.device.type == "cuda"}
    with (
        random_state_kept(sorted(gpus)),
        torch.enable_grad(),
        UNCOMPILED,
        buffers_kept(modules),
    ):
        yield
