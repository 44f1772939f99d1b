"""Models that several ranks hold together, or wrap."""

from __future__ import annotations

from torch import nn
from torch.nn.parallel import DistributedDataParallel


def is_sharded(model: nn.Module) -> bool:
    """Whether parameters lie with several ranks (`fully_shard`), who then run forward together."""
    return any(hasattr(parameter, "device_mesh") for parameter in model.parameters())


def unwrapped(model: nn.Module) -> nn.Module:
    """The module that `DistributedDataParallel` holds: its layers go by their own names.

    Its forward pass, and with it the reduction of gradients, is not what a fit is about.
    """
    return model.module if isinstance(model, DistributedDataParallel) else model
