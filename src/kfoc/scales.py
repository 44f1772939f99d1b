"""Scales that numbers are brought to, so that their powers stay within the range of a dtype."""

from __future__ import annotations

import math


def power_of_two(largest: float) -> float:
    """A power of two near `largest`; 1 where that is harmless, to save the copy."""
    if largest == 0.0 or 2.0**-8 <= largest <= 2.0**8:
        return 1.0
    return 2.0 ** math.floor(math.log2(largest))
