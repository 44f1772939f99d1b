"""What every kind of block can do, and the few primitives that it follows from."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from kfoc.blocks.damped import DampedBlock, DampedSpectrum, Damping
from kfoc.blocks.spectrum import Spectrum
from kfoc.common.ambient import Plain

AnyBlock = TypeVar("AnyBlock", bound="Block")


@dataclass(frozen=True)
class Report:
    """What is known of how a block came about.

    Attributes:
        relative_error: `||F - block||_F / ||F||_F` against the exact block of the data seen and,
            for drawn labels (`fisher="mc"`), of the very draws that the block was fitted to, noise
            and all; or None where nobody asked for it (`fit(..., probes=16)`) and it did not come
            for free.
        standard_error: the standard error of `relative_error`; 0 where it is exact.
        steps: half steps of the power iteration in the last solve (0: none).
        converged: False where an iteration ended at its step or pass limit.
        head: how many singular triples were kept between buffers of samples (`KFOC.head`); None
            where all were at hand at once, or nothing of that kind was kept.
        plan: the contraction used last, with what it was chosen by; "" where there is no choice.
        unchecked: what of docs/proof.md was not checked of its samples: "sums", where parameters
            are sharded, or "rows and sums", with `fit(..., verify=False)`.
        fisher_error: the same against the Fisher itself, the expectation over the model's labels,
            estimated from draws that the block has not seen; where nothing is drawn,
            `relative_error`. 0 where the estimate of its square is negative, NaN where that of
            `||F||^2` is; None where nobody asked for it.
        fisher_error_std: the standard error of `fisher_error`, by probes and draws: an estimate
            itself, and of a few dozen samples up to half too small.
        change: by how much sigma changed, relatively, in the last pass over the data; None where
            there is no iteration over passes.
    """

    relative_error: float | None = None
    standard_error: float | None = None
    steps: int = 0
    converged: bool = True
    plan: str = ""
    unchecked: str = ""
    fisher_error: float | None = None
    fisher_error_std: float | None = None
    head: int | None = None
    change: float | None = None


def placed(
    *args: Any, device: Any = None, dtype: Any = None
) -> tuple[torch.device | None, torch.dtype | None]:
    """A device and a dtype, as the `to` of tensors takes them: either, both, or another tensor.

    Raises:
        TypeError: anything else, or two of a kind.
        ValueError: a dtype that is no floating-point one.
    """
    devices, dtypes = [device], [dtype]
    for arg in args:
        if isinstance(arg, Tensor):
            devices.append(arg.device)
            dtypes.append(arg.dtype)
        else:
            (dtypes if isinstance(arg, torch.dtype) else devices).append(arg)
    devices, dtypes = ([e for e in each if e is not None] for each in (devices, dtypes))
    kinds = all(isinstance(e, torch.dtype) for e in dtypes)
    kinds &= all(isinstance(e, (torch.device, str)) or type(e) is int for e in devices)
    if not kinds or len(devices) > 1 or len(dtypes) > 1:
        raise TypeError(
            "to() takes a device, a dtype, both, or a tensor that has them, found "
            f"{', '.join(map(repr, [*devices, *dtypes]))}"
        )
    if dtypes and not dtypes[0].is_floating_point:
        raise ValueError(f"dtype must be a floating-point one, found {dtypes[0]}")
    return torch.device(devices[0]) if devices else None, dtypes[0] if dtypes else None


@dataclass(frozen=True)
class Block(Plain, ABC):
    """A symmetric matrix of size o * i, in one of several structures.

    All are positive semi-definite but `LowRankBlock`, which says so.
    """

    report: Report = field(default_factory=Report, kw_only=True)

    def __post_init__(self) -> None:
        kinds = {f"{tensor.dtype} on {tensor.device}" for tensor in self.tensors()}
        if len(kinds) > 1:
            raise ValueError(
                f"the tensors of a {type(self).__name__} must share dtype and device, found "
                f"{' and '.join(sorted(kinds))}: convert them, e.g. by .to(...)"
            )

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int]:
        """(o, i): the shape of the extended weight that the block is about."""

    @abstractmethod
    def to_dense(self) -> Tensor:
        """The block as a matrix, (o * i, o * i), row-major over (o, i)."""

    @abstractmethod
    def matvec(self, vectors: Tensor) -> Tensor:
        """The block times `vectors`, (..., o, i), of the same shape."""

    @abstractmethod
    def trace(self) -> float:
        """The sum of the diagonal."""

    @abstractmethod
    def scaled(self: AnyBlock, factor: float) -> AnyBlock:
        """`factor` times the block; the factor is not negative."""

    @abstractmethod
    def inner(self, other: Block) -> float:
        """The Frobenius inner product `<block, other>`, for any two kinds of the same shape."""

    @abstractmethod
    def inner_kronecker(self, left: Tensor, right: Tensor) -> Tensor:
        """`<block, kron(left, right)>`, a scalar; `right` (i, i), or (i,) for a diagonal."""

    @abstractmethod
    def diagonal_in(self, left: Tensor | None, right: Tensor | None) -> Tensor:
        """The block's diagonal in a basis: `w^T block w` for `w = kron(left[:, p], right[:, q])`.

        Args:
            left: (o, p); None is the identity.
            right: (i, q), likewise.

        Returns:
            (p, q).
        """

    def check(self) -> None:
        """Raise ValueError where what the block holds makes none of its kind."""

    @abstractmethod
    def damped(self, damping: Damping) -> DampedBlock:
        """`scale * block + damping * identity`, factorised: to solve with as often as wanted.

        Raises:
            ValueError: a matrix that is not finite, or not positive semi-definite, or a sum of
                Kronecker products that is too large to be factorised.
        """

    def forget(self) -> None:
        """Free what the block has kept from one use for the next, where it keeps anything."""

    @property
    def dtype(self) -> torch.dtype:
        return next(self.tensors()).dtype

    @property
    def device(self) -> torch.device:
        return next(self.tensors()).device

    def tensors(self) -> Iterator[Tensor]:
        """All tensors that the block holds."""
        for value in self.parts().values():
            if isinstance(value, Tensor):
                yield value
            elif isinstance(value, tuple):
                for item in value:
                    if isinstance(item, Block):
                        yield from item.tensors()

    def parts(self) -> dict[str, Any]:
        """The fields that make the block, by name: tensors, tuples of blocks, numbers."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name != "report"}

    def mapped(self: AnyBlock, function: Callable[[Tensor], Tensor]) -> AnyBlock:
        """The block with `function` applied to every tensor that it holds."""
        changes: dict[str, Any] = {}
        for name, value in self.parts().items():
            if isinstance(value, Tensor):
                changes[name] = function(value)
            elif isinstance(value, tuple) and value and isinstance(value[0], Block):
                changes[name] = tuple(item.mapped(function) for item in value)
        return replace(self, **changes)

    def to(self: AnyBlock, *args: Any, **kwargs: Any) -> AnyBlock:
        """The block on another device or in another floating-point dtype; arguments as `placed`."""
        device, dtype = placed(*args, **kwargs)
        return self.mapped(lambda tensor: tensor.to(device=device, dtype=dtype))

    def frobenius_norm(self) -> float:
        """`||block||_F`, computed in float64."""
        wide = self.to(dtype=torch.float64)
        return max(wide.inner(wide), 0.0) ** 0.5

    @property
    def relative_error(self) -> float | None:
        """Against the F of the block's own draws, see `Report.relative_error`."""
        return self.report.relative_error

    @property
    def relative_error_standard_error(self) -> float | None:
        """See `Report.standard_error`."""
        return self.report.standard_error

    @property
    def fisher_error(self) -> float | None:
        """Against the Fisher itself, see `Report.fisher_error`."""
        return self.report.fisher_error

    @property
    def fisher_error_std(self) -> float | None:
        """See `Report.fisher_error_std`."""
        return self.report.fisher_error_std

    def _check_vectors(self, vectors: Tensor) -> None:
        if tuple(vectors.shape[-2:]) != self.shape:
            raise ValueError(
                f"vectors must end in the shape {self.shape} of the block's weight, found "
                f"{tuple(vectors.shape)}"
            )
        if (vectors.dtype, vectors.device) != (self.dtype, self.device):
            raise ValueError(
                f"vectors must be {self.dtype} on {self.device}, as the block is, found "
                f"{vectors.dtype} on {vectors.device}: convert them, or the block by block.to(...)"
            )


@dataclass(frozen=True)
class SpectralBlock(Block):
    """A block whose eigendecomposition is affordable."""

    @abstractmethod
    def spectrum(self) -> Spectrum:
        """The eigendecomposition, in the dtype that it is computed in (float32 at least).

        Raises:
            ValueError: a matrix that is not finite, or not positive semi-definite.
        """

    def damped(self, damping: Damping) -> DampedBlock:
        return DampedSpectrum(self.spectrum(), damping)
