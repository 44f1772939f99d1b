"""Sums whose scale is kept apart: numbers beside them, of other scales, might leave their dtype."""

from __future__ import annotations

from abc import ABC, abstractmethod

from kfoc.estimators.pooling import Pooling, largest


class Scaled(ABC):
    """Sums that are `unit` times their tensors; 0 before anything but zeros was added."""

    unit: float

    @abstractmethod
    def scale(self, factor: float) -> None:
        """Multiply the tensors."""

    def room(self, scale: float) -> float:
        """Make room for numbers that are to be multiplied by `scale`.

        Returns:
            What to multiply them by instead, to add them to the tensors: at most 1.
        """
        self.rescale(max(self.unit, scale))
        return scale / (self.unit or 1.0)

    def rescale(self, unit: float) -> None:
        """Have the same sums in another unit."""
        if unit and unit != self.unit:
            self.scale(self.unit / unit)
            self.unit = unit

    def in_common_units(self) -> Pooling[None]:
        """Have them in the largest unit of all ranks, so that tensors can be added up."""
        (unit,) = yield from largest(self.unit)
        self.rescale(unit)
