"""Random numbers that are a function of the seed and of the sample's index in the data."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

Integers = TypeVar("Integers", Tensor, "np.ndarray[Any, Any]")


@dataclass(frozen=True)
class Draws:
    """Random numbers that depend on (seed, sample index, direction, place) alone.

    Attributes:
        seed: of the draws.
        first_index: the first sample's position in the data set.
        direction: which of the draws of a sample.
        total: the draws of a sample, `mc_samples`.
    """

    seed: int
    first_index: int
    direction: int = 0
    total: int = 1

    def uniform(self, count: int, places: int, device: torch.device) -> Tensor:
        """(count, places), float64 in (0, 1), for the samples from `first_index` on."""
        key = _mix(_mix(self.seed) + self.direction)
        first, last = self.first_index, self.first_index + count
        # In the middle of their interval: never 0, never 1.
        if device.type == "cpu":  # NumPy starts on a few numbers in a fraction of torch's time
            counted = np.arange(first, last, dtype=np.uint64)
            numbers = _bits(counted, np.arange(places, dtype=np.uint64), key).astype(np.float64)
            numbers += 0.5
            numbers /= 2**53
            return torch.tensor(numbers)  # in memory of torch's: NumPy's lies anywhere
        indices = torch.arange(first, last, device=device)
        bits = _bits(indices, torch.arange(places, device=device), key)
        return bits.double().add_(0.5).div_(2**53)

    def signs(self, count: int, places: int, device: torch.device) -> Tensor:
        """(count, places), float64: 1 or -1, by the halves of `uniform`."""
        return 1 - 2 * self.uniform(count, places, device).mul_(2).floor_().clamp_(max=1)

    def spread(self, count: int, places: int, device: torch.device) -> Tensor:
        """(count, places), float64 in (0, 1]: this direction's point of systematic sampling.

        The points of a place are `1 / total` apart. Where they begin is in the bits of the first
        direction's `uniform` that its sign leaves over: independent of all signs.
        """
        step = self.direction % self.total
        first = replace(self, direction=self.direction - step).uniform(count, places, device)
        # Not 0, where a search finds the first class whatever its probability.
        return first.mul_(2).remainder_(1).neg_().add_(1 + step).div_(self.total)


# SplitMix64 (Steele, Lea & Flood 2014): a counter in steps of gamma, through a finaliser that
# spreads every bit. For Python's integers, NumPy's unsigned and torch's signed ones, which wrap.
_GAMMA = 0x9E3779B97F4A7C15
_FIRST, _SECOND = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def _bits(indices: Integers, places: Integers, key: int) -> Integers:
    """53 bits each, (count, places). Every index starts a sequence of its own, in `places` steps.

    Works in the memory of its arguments.
    """
    indices *= _wrapped(_GAMMA, indices)
    indices += _wrapped(key, indices)
    values = _mixed(indices)[:, None]
    if places.shape[0] != 1:
        places *= _wrapped(_GAMMA, places)
        values = values + places
    values = _mixed(values)
    values >>= 11
    if isinstance(values, Tensor):
        values &= 2**53 - 1
    return values


def _mixed(values: Integers) -> Integers:
    values = _folded(values, 30)
    values *= _wrapped(_FIRST, values)
    values = _folded(values, 27)
    values *= _wrapped(_SECOND, values)
    return _folded(values, 31)


def _mix(value: int) -> int:
    value = (value + _GAMMA) % 2**64
    value = (value ^ value >> 30) * _FIRST % 2**64
    value = (value ^ value >> 27) * _SECOND % 2**64
    return value ^ value >> 31


def _wrapped(value: int, like: Integers) -> int:
    """An unsigned number of 64 bits, as torch has it."""
    return value - 2**64 if value >= 2**63 and isinstance(like, Tensor) else value


def _folded(values: Integers, bits: int) -> Integers:
    """`values ^ (values >> bits)` with a logical shift; torch shifts signed integers by sign."""
    shifted = values >> bits
    if isinstance(shifted, Tensor):
        shifted &= 2 ** (64 - bits) - 1
    shifted ^= values
    return shifted
