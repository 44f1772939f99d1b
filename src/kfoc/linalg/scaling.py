"""Norms and magnitudes, and scales that keep powers of numbers within a dtype's range."""

from __future__ import annotations

import cmath
import math
from collections.abc import Collection

import torch
from torch import Tensor

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


def balanced(left: Tensor, right: Tensor, sigma: float) -> tuple[Tensor, Tensor]:
    """The factors of norm `sqrt(sigma)` each, in the directions given; zeros where one is zero.

    The norms are taken as Python floats, one factor at a time, so that no product of the two
    scales can overflow.
    """
    return balance(left.clone(), right.clone(), sigma)


def balance(left: Tensor, right: Tensor, sigma: float) -> tuple[Tensor, Tensor]:
    """As `balanced`, in place: a copy of a large layer's factors is what memory peaks at."""
    left_norm, right_norm = norm_of(left), norm_of(right)
    if not sigma or not left_norm or not right_norm:
        return left.zero_(), right.zero_()
    root = math.sqrt(sigma)
    return left.mul_(root / left_norm), right.mul_(root / right_norm)


def norm_of(tensor: Tensor) -> float:
    """The Frobenius norm, also of numbers whose squares leave the range of the dtype."""
    # Sums of a million squares one by one would be off by 1e-5 in float32: first by rows.
    norm = (tensor.norm(dim=1) if tensor.ndim == 2 else tensor).norm().item()
    if 1e-15 < norm < 1e15:
        return norm
    return torch.linalg.vector_norm(tensor, dtype=torch.float64).item()


def magnitude(values: Tensor) -> float:
    """The largest absolute value of a tensor, without a copy of it; NaN where there is one."""
    if not values.numel():
        return 0.0
    low, high = torch.aminmax(values)
    if values.device.type == "cpu":  # elsewhere every number that is read waits for the device
        return max(high.item(), -low.item())
    return torch.maximum(-low, high).item()


def largest(values: Collection[float]) -> float:
    """The largest; not finite where one is not, which max() would drop."""
    total = sum(values)
    return max(values) if math.isfinite(total) else total


def wide(tensor: Tensor) -> Tensor:
    """In float32, where it is in half precision, which squares to nothing."""
    return tensor.float() if tensor.is_floating_point() and tensor.element_size() < 4 else tensor


def finite(values: Tensor) -> bool:
    """Whether all are. Their sum is not where one is not, and hardly ever where all are."""
    return cmath.isfinite(values.sum().item()) or bool(values.isfinite().all())
