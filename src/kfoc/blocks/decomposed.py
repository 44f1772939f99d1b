"""Blocks that are damped by an eigendecomposition, and keep it."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from kfoc.blocks import sound
from kfoc.blocks.base import SpectralBlock, placed
from kfoc.blocks.spectrum import Spectrum

AnyDecomposed = TypeVar("AnyDecomposed", bound="DecomposedBlock")


@dataclass(frozen=True)
class DecomposedBlock(SpectralBlock):
    """A block whose eigendecomposition takes the cube of its rows: made once, and kept.

    It takes as much memory as the block's tensors, and an eigenvalue for each parameter. It goes
    along to another device; what is computed of the block (other dtypes, multiples, sums) has its
    own. Where a tensor of the block is written to, the next use decomposes again: that is seen by
    the numbers, as torch does not count writes through `.data`, NumPy or inference mode.
    """

    @abstractmethod
    def decomposition(self) -> Spectrum:
        """Its eigendecomposition, made anew; errors as of `spectrum`."""

    @abstractmethod
    def decomposed(self) -> dict[str, Tensor]:
        """The matrices that are decomposed, by what the names of `Spectrum.parts` begin with."""

    def spectrum(self) -> Spectrum:
        found = self.kept
        if found is None:
            found = self.decomposition()
            self.keep(found)
        return found

    @property
    def kept(self) -> Spectrum | None:
        """The eigendecomposition, where there is one of the tensors as they are now."""
        spectrum, marks = vars(self).get("_kept", (None, None))
        return None if marks is None or not self.has(marks) else spectrum

    def keep(self, spectrum: Spectrum) -> None:
        """Take an eigendecomposition of this block for its own."""
        vars(self)["_kept"] = spectrum, self.marks()  # beside the fields, which are frozen

    def forget(self) -> None:
        """Free the eigendecomposition; the next use makes another."""
        vars(self).pop("_kept", None)

    def to(self: AnyDecomposed, *args: Any, **kwargs: Any) -> AnyDecomposed:
        moved, kept = super().to(*placed(*args, **kwargs)), self.kept
        if kept is not None and moved.dtype == self.dtype:
            moved.keep(kept.moved(moved.device))
        return moved

    def check_spectrum(self, spectrum: Spectrum) -> None:
        """Raise ValueError where a spectrum, as of a file, is not of this block."""
        parts = spectrum.parts()
        for prefix, matrix in self.decomposed().items():
            values, vectors = parts.get(f"{prefix}values"), parts.get(f"{prefix}vectors")
            sound.decomposition(prefix, matrix, values, vectors)
        if tuple(spectrum.values.shape) != self.shape:
            found = tuple(spectrum.values.shape)
            raise ValueError(f"its eigenvalues have the shape {found}, not {self.shape}")

    def marks(self) -> list[Tensor]:
        """What changes with the tensors' numbers, by more than eigenvectors' rounding."""
        return [sound.product(tensor) for tensor in self.tensors()]

    def has(self, marks: list[Tensor]) -> bool:
        """Whether `marks` were taken of the numbers that the block has now."""
        return all(map(torch.equal, marks, self.marks()))
