"""Scales that numbers are brought to, so that their powers stay within the range of a dtype."""

from __future__ import annotations

import math

import torch

# The first exponents of normal numbers, in float32 and float64.
_FIRST_EXPONENTS = -126, -1022


def power_of_two(largest: float) -> float:
    """A power of two near `largest`; 1 where that is harmless, to save the copy.

    Its reciprocal is a number of the dtype too, also for subnormal ones.
    """
    if largest == 0.0 or 2.0**-8 <= largest <= 2.0**8:
        return 1.0
    exponent = math.floor(math.log2(largest))
    for first, bits in zip(_FIRST_EXPONENTS, (23, 52), strict=True):
        if first - bits <= exponent < first:
            exponent = first
    return 2.0**exponent


def squared(scale: float) -> float:
    """The scale of F from that of per-sample gradients.

    Raises:
        ValueError: it is beyond the range of Python's numbers, as float64 gradients' may be.
    """
    if not 1e-150 < scale < 1e150:
        raise ValueError(
            f"per-sample gradients are near {scale:.0e}, whose squares leave the range of float64: "
            "bring the inputs or the outputs to another scale"
        )
    return scale * scale


def check_representable(largest: float, dtype: torch.dtype, what: str = "its block") -> None:
    """Raise where numbers up to `largest`, if not 0, are not numbers of a dtype.

    Small ones lose their digits before they vanish: three are left at the least.
    """
    info = torch.finfo(dtype)
    if largest and not 2**10 * info.eps * info.tiny <= largest <= info.max:
        raise ValueError(beyond(what, dtype, f"{largest:.0e}"))


def beyond(what: str, dtype: torch.dtype, found: str) -> str:
    """That numbers do not fit their dtype, and what to do."""
    scale = "another scale" if found else "a smaller scale"
    near = f" near {found}," if found else ""
    return (
        f"{what} has numbers{near} beyond the range of {dtype}: bring its inputs or the outputs to "
        f"{scale}, or fit the model in float64 (model.double())"
    )
