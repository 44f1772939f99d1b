"""What tells one batch from another, for the passes that have to see the same ones."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from kfoc.likelihoods.base import Likelihood


@dataclasses.dataclass(frozen=True)
class Mark:
    """What tells one batch from another: sums over each sample's outputs, and over its targets.

    Attributes:
        sums, scales: (N,) each: of the values, and of their magnitudes.
        precision: the relative difference that rounding may make.
        targets: the marks of the tensors among the targets, or of what of them F depends on.
    """

    sums: Tensor
    scales: Tensor
    precision: float
    targets: tuple[Mark, ...] = ()

    @classmethod
    def of(cls, values: Tensor, targets: Any = None) -> Mark:
        """The mark of outputs (N, ...); targets count where they are tensors (N, ...)."""
        rows = values.detach().reshape(len(values), -1)
        rows = rows.nan_to_num(0, 0, 0) if rows.is_floating_point() else rows.double()
        half = values.dtype in (torch.float16, torch.bfloat16)
        return cls(
            rows.sum(1, dtype=torch.float64).cpu(),
            rows.abs().sum(1, dtype=torch.float64).cpu(),
            # Half precision differs by a unit in the last place where a device sums in any order.
            torch.finfo(values.dtype).eps if half else 1e-5,
            tuple(cls.of(each) for each in _tensors(targets)),
        )

    @classmethod
    def of_batch(cls, outputs: Tensor, targets: Any, likelihood: Likelihood, fisher: str) -> Mark:
        """The mark of a batch that the likelihood has checked.

        Where labels are the model's own, F depends on the targets by how much each sample counts
        alone: weights, and labels that are ignored.
        """
        of_targets = fisher == "empirical"
        return cls.of(outputs, targets if of_targets else likelihood.num_labels(outputs, targets))

    def same(self, other: Mark) -> bool:
        """Whether both are of the same samples in the same order, to rounding."""
        if self.sums.shape != other.sums.shape or len(self.targets) != len(other.targets):
            return False
        close = (self.sums - other.sums).norm() <= self.precision * self.scales.norm()
        parts = zip(self.targets, other.targets, strict=True)
        return bool(close) and all(one.same(two) for one, two in parts)


def _tensors(targets: Any) -> list[Tensor]:
    if isinstance(targets, (tuple, list)):
        return [tensor for each in targets for tensor in _tensors(each)]
    return [targets] if isinstance(targets, Tensor) and targets.ndim else []
