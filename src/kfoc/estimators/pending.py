"""Batches of one layer that wait to be taken in together."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from kfoc.samples.linear import Samples


@dataclass
class Pending:
    """Copies of batches, as a loader may write over its own.

    They lie one behind the other in memory that is kept: fresh pages for every batch, and again
    for all of them as one, would cost as much as what is computed with them.

    Attributes:
        room: numbers that there is memory for. What does not fit is copied by itself.
        parts: the batches.
    """

    room: int
    parts: list[Samples] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._forget()

    def _forget(self) -> None:
        # Not fields, and so no part of a saved state.
        self._memory: tuple[Tensor, Tensor] | None = None
        self._used = 0  # samples at the beginning of it

    def __getattr__(self, name: str) -> Any:
        """What a saved state does not have."""
        if name not in ("_memory", "_used"):
            raise AttributeError(name)
        self._forget()
        return self.__dict__[name]

    def add(self, samples: Samples) -> None:
        self.parts.append(self._kept(samples) or samples.detached_copy())

    @property
    def numel(self) -> int:
        return sum(part.numel for part in self.parts)

    @property
    def num_samples(self) -> int:
        return sum(part.num_samples for part in self.parts)

    def joins(self, samples: Samples) -> bool:
        return not self.parts or self.parts[0].joins(samples)

    def taken(self) -> list[Samples]:
        """The batches, which are not pending any more: valid until the next is added."""
        parts, self.parts, self._used = self._joined(), [], 0
        return parts

    def _kept(self, samples: Samples) -> Samples | None:
        """A copy in the kept memory, where it has room and all batches so far lie in it."""
        count = samples.num_samples
        # With several directions, part of the memory would not be contiguous.
        if type(samples) is not Samples or not samples.numel:
            return None
        if samples.num_directions != 1 or self._used != self.num_samples:
            return None
        if self._memory is None:
            capacity = self.room * count // samples.numel
            tensor, grads = samples.inputs.tensor, samples.grads
            self._memory = (
                tensor.new_empty(capacity, *tensor.shape[1:]),
                grads.new_empty(capacity, *grads.shape[2:]),
            )
        inputs, grads = self._memory
        start, stop = self._used, self._used + count
        shapes = samples.inputs.tensor.shape[1:], samples.grads.shape[2:]
        alike = self.joins(samples) and shapes == (inputs.shape[1:], grads.shape[1:])
        if stop > len(inputs) or not alike:
            return None
        self._used = stop
        tensor = inputs[start:stop].copy_(samples.inputs.tensor)
        kept = grads[start:stop].copy_(samples.grads[0])
        return Samples(samples.inputs.with_tensor(tensor), kept[None])

    def _joined(self) -> list[Samples]:
        """As few batches as there are kinds: those of other lengths of sequences do not join."""
        if self.parts and self._memory is not None and self._used == self.num_samples:
            inputs, grads = (memory[: self._used] for memory in self._memory)
            # Strides as of a copy, also those of a dimension of one, which decide between mm and
            # bmm: a fit that goes on from its saved state takes in copies, to the same bits.
            return [Samples(self.parts[0].inputs.with_tensor(inputs), grads[None])]
        return joined(self.parts)


def joined(parts: list[Samples]) -> list[Samples]:
    """Batches that can be one, as one."""
    kinds: list[list[Samples]] = []
    for batch in parts:
        kind = next((kind for kind in kinds if kind[0].joins(batch)), None)
        if kind is None:
            kinds.append([batch])
        else:
            kind.append(batch)
    return [kind[0].merged(kind) for kind in kinds]
