"""What an estimator spends on each layer."""

from __future__ import annotations

import copy
import time
from typing import Any

import torch

from kfoc import Estimator


def timed(
    estimator: Estimator,
    seconds: dict[str, float],
    cuda: bool = False,
    owners: dict[int, tuple[str, Any]] | None = None,
) -> Estimator:
    """A copy of the estimator that adds to `seconds` what it spends on each layer, in all passes.

    Four methods of the copy are others. All else that a fit may ask of an estimator, a budget of
    memory for one, is as it was. The forward and backward pass are not in the seconds.

    Args:
        cuda: wait for the GPU before the clock is read.
        owners: whose a state is, by its id; the state is kept here as well, so that its id stays
            its own.
    """
    clocked = copy.copy(estimator)
    owners = {} if owners is None else owners

    def clock(name: str) -> Any:
        method = getattr(estimator, name)  # which calls itself untimed

        def call(first: Any, *arguments: Any, **options: Any) -> Any:
            layer = first if name == "init" else owners.pop(id(first))[0]
            if cuda:
                torch.cuda.synchronize()
            start = time.perf_counter()
            result = method(first, *arguments, **options)
            if cuda:
                torch.cuda.synchronize()
            seconds[layer] = seconds.get(layer, 0.0) + time.perf_counter() - start
            if name != "finish":
                state = result[0] if name == "next_pass" else result
                owners[id(state)] = layer, state
            return result

        return call

    def sized(layouts: Any) -> Estimator:
        return timed(estimator.sized(layouts), seconds, cuda, owners)

    for name in ("init", "update", "next_pass", "finish"):
        object.__setattr__(clocked, name, clock(name))  # of a frozen dataclass too
    object.__setattr__(clocked, "sized", sized)
    return clocked
