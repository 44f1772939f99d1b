"""Buffers that a forward pass changes, put back as they were found."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


def version(buffer: Tensor) -> int:
    """What tells a buffer from itself before it was written to."""
    return 0 if buffer.is_inference() else buffer._version  # those cannot be written to


@dataclass
class _Held:
    """A module as it was found: its buffers with copies of them, and its attributes."""

    module: nn.Module
    buffers: dict[str, Tensor | None]
    copies: dict[str, tuple[int, Tensor]]
    attributes: dict[str, Any]

    @staticmethod
    def of(module: nn.Module) -> _Held:
        buffers = dict(module._buffers)
        copies = {k: (version(b), b.detach().clone()) for k, b in buffers.items() if b is not None}
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
        for name, (number, copy) in self.copies.items():
            buffer = present[name]
            # Kernels that write running statistics, in train mode alone, do not count versions.
            if buffer is not None and (module.training or version(buffer) != number):
                buffer.copy_(copy)


class buffers_kept:  # noqa: N801  (a context, used as contextlib's are)
    """All buffers of these modules are what they were, whether written to, replaced or added."""

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self.modules = list(modules)

    def __enter__(self) -> None:
        self.held = [_Held.of(module) for module in self.modules]

    def __exit__(self, *error: object) -> None:
        with torch.no_grad():
            for held in self.held:
                held.put_back()
