"""What the tensors of a block must be: for files, whose tensors nothing has looked at yet."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kfoc.linalg.scaling import wide


def numbers(what: str, value: Any, ndim: int) -> Tensor:
    """The value, where it is a tensor of finite floating-point numbers.

    Raises:
        ValueError: anything else, or other than `ndim` dimensions.
    """
    if not isinstance(value, Tensor):
        raise ValueError(f"its {what} must be a tensor, found {value!r:.60}")
    if not value.is_floating_point():
        raise ValueError(f"its {what} must have a floating-point dtype, found {value.dtype}")
    if value.ndim != ndim:
        raise ValueError(
            f"its {what} must have {ndim} dimensions, found the shape {tuple(value.shape)}"
        )
    if not value.isfinite().all():
        raise ValueError(f"its {what} has numbers that are not finite")
    return value


def symmetric(what: str, value: Any) -> None:
    """Raise where a matrix is none, or differs from its transpose by more than rounding."""
    matrix = _square(what, value, 2)
    if not _close(matrix, matrix.mT, rounding(matrix.dtype) * _largest(matrix)):
        apart = (matrix - matrix.mT).abs().max().item()
        raise ValueError(
            f"its {what} must be symmetric, found entries that are {apart:.3g} apart from those of "
            "its transpose"
        )


def symmetries(what: str, value: Any) -> list[int]:
    """1 or -1 for each of several matrices, symmetric or antisymmetric (0: zeros, which are both).

    Raises:
        ValueError: one that is neither.
    """
    found, terms = [], _square(what, value, 3)
    # Singular vectors are as precise as the gaps between singular values are wide.
    tolerance = rounding(terms.dtype) * torch.finfo(terms.dtype).eps ** -0.25 * _largest(terms)
    for k, matrix in enumerate(terms):
        if not matrix.any():
            found.append(0)
        elif _close(matrix, matrix.mT, tolerance):
            found.append(1)
        elif _close(matrix, -matrix.mT, tolerance):
            found.append(-1)
        else:
            raise ValueError(f"its {what}[{k}] must be symmetric or antisymmetric")
    return found


def orthonormal(what: str, value: Any) -> None:
    """Raise where the columns of a matrix are not orthonormal, as a product with it tells."""
    matrix = _square(what, value, 2)
    n = len(matrix)
    columns = wide(matrix)
    # One vector for all of them: n^3 numbers would take as long as to find the eigenvectors.
    probe = _probe(columns)
    error = (columns.mT @ (columns @ probe) - probe).norm() / (probe.norm() or 1.0)
    if error.item() > rounding(matrix.dtype, n):
        raise ValueError(f"the columns of its {what} must be orthonormal, off by {error:.3g}")


def decomposition(prefix: str, matrix: Tensor, values: Any, vectors: Any) -> None:
    """Raise where these are not the eigenvalues and eigenvectors of a matrix, (n, n) or (n,).

    As a product with one vector tells: n^3 numbers would take as long as to decompose again.

    Args:
        prefix: of their names; of a whole block, whose eigenvalues are (o, i), "".
        vectors: None for a diagonal one.
    """
    found = numbers(f"{prefix}values", values, 1 if prefix else 2).flatten()
    if len(found) != len(matrix):
        raise ValueError(f"its {prefix}values must be {len(matrix)} numbers, found {len(found)}")
    same = matrix.to(found)
    if matrix.ndim == 1:
        error, largest = found - same, _largest(same)
    else:
        if tuple(numbers(f"{prefix}vectors", vectors, 2).shape) != tuple(matrix.shape):
            raise ValueError(
                f"its {prefix}vectors must have the shape {tuple(matrix.shape)}, found "
                f"{tuple(vectors.shape)}"
            )
        orthonormal(f"{prefix}vectors", vectors)
        probe = _probe(found)
        error = vectors @ (found * (vectors.mT @ probe)) - same @ probe
        largest = _largest(found) * probe.norm().item()
    if error.norm().item() > rounding(matrix.dtype, len(matrix)) * largest:
        raise ValueError(f"its {prefix}values and {prefix}vectors are those of another matrix")


def rounding(dtype: torch.dtype, rows: int = 1) -> float:
    """Relative: what rounding sets numbers apart that should be equal.

    Sums round many times; those in 16 bits are formed in 32, and round once.

    Args:
        rows: of a matrix whose product with a vector the numbers are.
    """
    return (64 if dtype.itemsize > 2 else 4) * torch.finfo(dtype).eps * max(rows, 1) ** 0.5


def same_dtype(*tensors: Tensor) -> None:
    """Raise where tensors differ in dtype."""
    found = sorted({str(tensor.dtype) for tensor in tensors})
    if len(found) > 1:
        raise ValueError(f"its tensors must share a dtype, found {', '.join(found)}")


def _square(what: str, value: Any, ndim: int) -> Tensor:
    matrix = numbers(what, value, ndim)
    if matrix.shape[-1] != matrix.shape[-2]:
        raise ValueError(f"its {what} must be square, found the shape {tuple(matrix.shape)}")
    return matrix


def _close(first: Tensor, second: Tensor, tolerance: float) -> bool:
    if torch.equal(first, second):  # without memory for a difference
        return True
    return bool(((first - second).abs() <= tolerance).all())


def _largest(tensor: Tensor) -> float:
    return tensor.abs().max().item() if tensor.numel() else 0.0


def product(tensor: Tensor) -> Tensor:
    """Matrices (..., n) times one vector, in float32 at least; a copy of a vector (n,)."""
    tensor = tensor.detach()
    if tensor.ndim == 1:
        return tensor.clone()
    rows = wide(tensor).flatten(0, -2)
    return rows @ _probe(rows.mT)


def _probe(like: Tensor) -> Tensor:
    """A vector (n,) of numbers that are all different, for n rows."""
    return torch.linspace(1, 2, len(like), dtype=like.dtype, device=like.device).cos()
