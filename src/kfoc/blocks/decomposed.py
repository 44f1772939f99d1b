"""Blocks that are damped by an eigendecomposition, and keep it."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from kfoc.blocks import sound
from kfoc.blocks.base import SpectralBlock, placed
from kfoc.blocks.spectrum import Spectrum

AnyDecomposed = TypeVar("AnyDecomposed", bound="DecomposedBlock")


@dataclass(frozen=True)
class DecomposedBlock(SpectralBlock):
    """A block whose eigendecomposition takes the cube of its rows: made once, and kept.

    It takes as much memory as the block's tensors, and an eigenvalue for each parameter. It goes
    along to another device; what is computed of the block (other dtypes, multiples, sums) has its
    own. Where a tensor of the block is written to, the next use decomposes again.
    """

    @abstractmethod
    def decomposition(self) -> Spectrum:
        """Its eigendecomposition, made anew; errors as of `spectrum`."""

    def spectrum(self) -> Spectrum:
        found = self.kept
        if found is None:
            found = self.decomposition()
            self.keep(found)
        return found

    @property
    def kept(self) -> Spectrum | None:
        """The eigendecomposition, where there is one of the tensors as they are now."""
        spectrum, versions = vars(self).get("_kept", (None, ()))
        return spectrum if versions == self._versions() else None

    def keep(self, spectrum: Spectrum) -> None:
        """Take an eigendecomposition of this block for its own."""
        vars(self)["_kept"] = spectrum, self._versions()  # beside the fields, which are frozen

    def forget(self) -> None:
        """Free the eigendecomposition; the next use makes another."""
        vars(self).pop("_kept", None)

    def to(self: AnyDecomposed, *args: Any, **kwargs: Any) -> AnyDecomposed:
        moved, kept = super().to(*placed(*args, **kwargs)), self.kept
        if kept is not None and moved.dtype == self.dtype:
            moved.keep(kept.moved(moved.device))
        return moved

    def check_spectrum(self, spectrum: Spectrum) -> None:
        """Raise ValueError where a spectrum, as of a file, is not of this block.

        A product with one vector tells: to decompose again is what the file is to save.
        """
        for name, part in spectrum.parts().items():
            sound.numbers(name, part, 1 if name.endswith("_values") else 2)
            if name.endswith("vectors"):
                sound.orthonormal(name, part)
        if tuple(spectrum.values.shape) != self.shape:
            raise ValueError(
                f"its eigenvalues have the shape {tuple(spectrum.values.shape)}, not {self.shape}"
            )
        wide = self.to(dtype=spectrum.values.dtype)
        probe = torch.linspace(1, 2, self.shape[0] * self.shape[1]).to(spectrum.values)
        probe = (1e3 * probe).cos().view(self.shape)
        basis = spectrum.basis
        try:
            error = basis.back(basis.to(probe) * spectrum.values) - wide.matvec(probe)
        except RuntimeError as problem:
            raise ValueError("its tensors do not fit each other") from problem
        largest = spectrum.values.abs().max() * probe.norm()
        if error.norm() > sound.rounding(self.dtype, max(self.shape)) * largest:
            raise ValueError("it is the eigendecomposition of another block")

    def _versions(self) -> tuple[int, ...]:
        """Which change when a tensor is written to (tensors of inference mode do not count)."""
        return tuple(0 if t.is_inference() else t._version for t in self.tensors())
