"""A layer's inputs a, as a tensor or folded from several rows a sample."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol

from torch import Tensor
from torch.nn import functional

from kfoc.linalg.scaling import magnitude


class Inputs(Protocol):
    """A layer's inputs, (N, T, i), of which any range of samples can be asked for."""

    @property
    def num_samples(self) -> int: ...

    @property
    def num_positions(self) -> int: ...

    @property
    def size(self) -> int: ...

    def columns(self, start: int, stop: int) -> Tensor:
        """Samples `start` to `stop`, as (i, n, T): the layout in which unfolding is cheapest."""
        ...

    def rows(self, start: int, stop: int) -> Tensor:
        """Samples `start` to `stop`, as (n, T, i), contiguous."""
        ...

    def magnitude(self) -> float:
        """The largest absolute value; NaN where there is one."""
        ...

    def scaled(self, factor: float) -> Inputs:
        """The inputs times `factor`, the column of ones of a bias included."""
        ...

    @property
    def tensor(self) -> Tensor:
        """What the inputs are kept as, samples first."""
        ...

    def with_tensor(self, tensor: Tensor) -> Inputs:
        """Inputs of the same kind, kept as `tensor`."""
        ...

    @property
    def diagonal(self) -> bool:
        """Whether a Kronecker product's right factor is restricted to its diagonal, (i,)."""
        ...

    def silent(self, count: int) -> Inputs:
        """The inputs of `count` samples without any position."""
        ...


@dataclass(frozen=True)
class Rows:
    """Inputs held as a tensor `values` (N, T, i), or (N, T, i - 1) where there is a `constant`.

    The constant is the last column of all rows: that of a bias, 1 (or the scale that the inputs
    were brought to). It is not written out before a range of samples is asked for.
    """

    values: Tensor
    constant: float | None = None

    @property
    def num_samples(self) -> int:
        return self.values.shape[0]

    @property
    def num_positions(self) -> int:
        return self.values.shape[1]

    @property
    def size(self) -> int:
        return self.values.shape[2] + (self.constant is not None)

    def columns(self, start: int, stop: int) -> Tensor:
        return self._whole(start, stop).permute(2, 0, 1)

    def rows(self, start: int, stop: int) -> Tensor:
        return self._whole(start, stop).contiguous()

    def _whole(self, start: int, stop: int) -> Tensor:
        values = self.values[start:stop]
        if self.constant is None:
            return values
        return functional.pad(values, (0, 1), value=self.constant)

    def magnitude(self) -> float:
        return max(magnitude(self.values), abs(self.constant or 0.0))

    def scaled(self, factor: float) -> Rows:
        constant = None if self.constant is None else self.constant * factor
        return Rows(self.values * factor, constant)

    @property
    def tensor(self) -> Tensor:
        return self.values

    def with_tensor(self, tensor: Tensor) -> Rows:
        return replace(self, values=tensor)

    @property
    def diagonal(self) -> bool:
        return False

    def silent(self, count: int) -> Rows:
        return Rows(self.values.new_empty(count, 0, self.values.shape[2]), self.constant)


@dataclass(frozen=True)
class Folded:
    """Inputs that came with `each` rows for every sample, one behind the other: windows, frames.

    A sample's positions are those of its rows, in order.
    """

    inner: Inputs  # of (N * each) rows
    each: int

    @property
    def num_samples(self) -> int:
        return self.inner.num_samples // self.each

    @property
    def num_positions(self) -> int:
        return self.inner.num_positions * self.each

    @property
    def size(self) -> int:
        return self.inner.size

    @property
    def constant(self) -> float | None:
        return getattr(self.inner, "constant", None)

    def columns(self, start: int, stop: int) -> Tensor:
        columns = self.inner.columns(start * self.each, stop * self.each)
        return columns.reshape(self.size, stop - start, -1)

    def rows(self, start: int, stop: int) -> Tensor:
        rows = self.inner.rows(start * self.each, stop * self.each)
        return rows.reshape(stop - start, -1, self.size)

    def magnitude(self) -> float:
        return self.inner.magnitude()

    def scaled(self, factor: float) -> Folded:
        return Folded(self.inner.scaled(factor), self.each)

    def split(self, groups: int) -> list[Folded]:
        """The inputs of each group of channels, of patches."""
        parts = self.inner.split(groups)  # type: ignore[attr-defined]
        return [Folded(part, self.each) for part in parts]

    @property
    def tensor(self) -> Tensor:
        return self.inner.tensor.unflatten(0, (-1, self.each))

    def with_tensor(self, tensor: Tensor) -> Folded:
        return Folded(self.inner.with_tensor(tensor.flatten(0, 1)), self.each)

    @property
    def diagonal(self) -> bool:
        return self.inner.diagonal

    def silent(self, count: int) -> Inputs:
        return self.inner.silent(count)
