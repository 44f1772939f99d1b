"""Buffers that a forward pass changes, put back as they were found."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@torch.no_grad()
def put(value: Tensor, buffer: Tensor) -> None:
    """Write to a buffer where its numbers are others.

    Versions do not tell, as kernels of normalisation do not count them; and one more would make
    the backward pass of a graph fail that the user has not gone through yet.
    """
    if not torch.equal(buffer, value):
        buffer.copy_(value)


@dataclass
class _Held:
    """A module as it was found: its buffers with copies of them, and its attributes."""

    module: nn.Module
    buffers: dict[str, Tensor | None]
    copies: dict[str, Tensor]
    attributes: dict[str, Any]

    @staticmethod
    def of(module: nn.Module) -> _Held:
        buffers = dict(module._buffers)
        copies = {k: b.detach().clone() for k, b in buffers.items() if b is not None}
        return _Held(module, buffers, copies, dict(vars(module)))

    def put_back(self) -> None:
        module, present = self.module, self.module._buffers
        if present.keys() != self.buffers.keys() or any(
            present[name] is not buffer for name, buffer in self.buffers.items()
        ):
            for name in present.keys() - self.buffers.keys():
                module._non_persistent_buffers_set.discard(name)
            present.clear()
            present.update(self.buffers)
            # What else the module keeps tells of them, as for how long a sequence a table is.
            vars(module).clear()
            vars(module).update(self.attributes)
        for name, copy in self.copies.items():
            buffer = self.buffers[name]
            if buffer is not None:
                put(copy, buffer)


class buffers_kept:  # noqa: N801  (a context, used as contextlib's are)
    """All buffers of these modules are what they were, whether written to, replaced or added."""

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self.modules = list(modules)

    def __enter__(self) -> None:
        self.held = [_Held.of(module) for module in self.modules]

    def __exit__(self, *error: object) -> None:
        for held in self.held:
            held.put_back()
