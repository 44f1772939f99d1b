"""What tells one batch from another, for the passes that have to see the same ones."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class Mark:
    """What tells one batch from another: sums over each sample's outputs, and over its targets.

    Attributes:
        sums, scales: (N,) each: of the values, and of their magnitudes.
        precision: the relative difference that rounding may make.
        targets: the mark of the targets, where they matter.
    """

    sums: Tensor
    scales: Tensor
    precision: float
    targets: Mark | None = None

    @classmethod
    def of(cls, values: Tensor, targets: Any = None) -> Mark:
        """The mark of outputs (N, ...); targets count where they are a tensor (N, ...)."""
        rows = values.detach().reshape(len(values), -1)
        rows = rows if rows.is_floating_point() else rows.double()
        half = values.dtype in (torch.float16, torch.bfloat16)
        return cls(
            rows.sum(1, dtype=torch.float64).cpu(),
            rows.abs().sum(1, dtype=torch.float64).cpu(),
            # Half precision differs by a unit in the last place where a device sums in any order.
            torch.finfo(values.dtype).eps if half else 1e-5,
            cls.of(targets) if isinstance(targets, Tensor) and targets.ndim else None,
        )

    def same(self, other: Mark) -> bool:
        """Whether both are of the same samples in the same order, to rounding."""
        if self.sums.shape != other.sums.shape or (self.targets is None) != (other.targets is None):
            return False
        close = (self.sums - other.sums).norm() <= self.precision * self.scales.norm()
        if self.targets is None or other.targets is None:
            return bool(close)
        return bool(close) and self.targets.same(other.targets)
