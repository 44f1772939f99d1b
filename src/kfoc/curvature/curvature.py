"""A model's curvature: one block per layer."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from kfoc.blocks import Block, placed
from kfoc.common.ambient import Plain
from kfoc.curvature.arithmetic import Comparison, compared, merged
from kfoc.curvature.damped import DampedCurvature, Dampings, dampings
from kfoc.curvature.file import Stored, read, write
from kfoc.errors import by_layer, problem
from kfoc.parameters.coverage import Coverage, ParameterCount, coverage
from kfoc.parameters.flat import flattened, scipy_operator, unflattened
from kfoc.parameters.layout import Layout
from kfoc.parameters.vectors import Operators, Places, Vector, applied, joined, quadratic


@dataclass(frozen=True, repr=False)
class Curvature(Plain, Mapping[str, Block]):
    """Layer name -> block of the mean Fisher, in the order of the model's modules.

    Vectors, as `matvec` and the like take them, are dicts of exactly the parameters that the
    curvature covers, name -> tensor of the parameter's shape, or of any leading dimensions before
    it that all share. They are computed with as the blocks are, and come back in their own
    dtypes, on their own devices.

    Attributes:
        blocks: the blocks by layer name, as in `model.named_modules()`.
        num_samples: how many samples the mean is over: `num_samples * block` is the sum.
        layouts: layer name -> the parameters that its block is about, and where they lie in the
            matrix `[W | b]`.
        skipped: name of a layer with parameters that has no block -> the reason.
        estimator: how it was fitted; empty where that is not known.
        fisher: the Fisher type, likewise.
        seed: of the draws; None where that is not known.
        counts: every parameter of the model, by name: its size, and whether it is trained.
    """

    blocks: dict[str, Block]
    num_samples: int
    layouts: dict[str, Layout]
    skipped: dict[str, str]
    estimator: str = ""
    fisher: str = ""
    seed: int | None = None
    counts: dict[str, ParameterCount] = field(default_factory=dict)

    @property
    def coverage(self) -> Coverage:
        """How many of the model's parameters are treated, skipped and frozen, by layer."""
        return coverage(self.counts, self.layouts, self.skipped)

    @property
    def layers(self) -> tuple[str, ...]:
        """The names of the layers that have a block."""
        return tuple(self.blocks)

    @property
    def parameters(self) -> dict[str, tuple[str, ...]]:
        """Layer name -> the names of the parameters that its block is about."""
        return {layer: layout.names for layer, layout in self.layouts.items()}

    def matvec(self, vector: Vector) -> dict[str, Tensor]:
        """`F v`."""
        return applied(vector, self.layouts, self._operators, self._places)

    def quadratic_form(self, vector: Vector) -> Tensor:
        """`v^T F v`, of the leading dimensions of v."""
        return quadratic(vector, self.layouts, self._operators, self._places)

    def vector(self, model: nn.Module, *, grad: bool = False) -> dict[str, Tensor]:
        """A model's parameters, or their gradients, as the vector that the methods here take.

        Parameters that the curvature does not cover are left out; a gradient that is None is zero.

        Args:
            model: that the curvature is of, or another one with parameters of the same names.
            grad: the gradients that its parameters hold, in place of their values.

        Raises:
            ValueError: parameters that the model does not have, or has in other shapes.
        """
        named, found = dict(model.named_parameters(remove_duplicate=False)), {}
        for layer, layout in self.layouts.items():
            for name, shape in zip(layout.names, layout.shapes, strict=True):
                held = named.get(name)
                if held is None or tuple(held.shape) != shape:
                    there = "no such parameter" if held is None else f"one of {list(held.shape)}"
                    raise problem(
                        layer,
                        f"the curvature has a parameter {name!r} of {list(shape)}, and the model "
                        + there,
                    )
                value: Tensor = held
                if grad:
                    value = torch.zeros_like(held) if held.grad is None else held.grad
                found[name] = value.detach()
        return found

    def diagonal(self) -> dict[str, Tensor]:
        """The diagonal of F by parameter name, in the parameter's shape."""
        parts = {layer: block.diagonal_in(None, None) for layer, block in self.blocks.items()}
        return joined(parts, self.layouts)

    def spectrum(self) -> dict[str, Tensor]:
        """Layer name -> all eigenvalues of its block, the largest first.

        Raises:
            ValueError: a block that is not finite or positive semi-definite, or a large sum of
                Kronecker products; the message names the layer.
        """
        damped = self.damped(0.0).blocks
        return {k: each.eigenvalues().sort(descending=True).values for k, each in damped.items()}

    def trace(self) -> float:
        """`tr F`."""
        return sum(block.trace() for block in self.blocks.values())

    def frobenius_norm(self) -> float:
        """`||F||_F`, computed in float64 without forming F."""
        return sum(block.frobenius_norm() ** 2 for block in self.blocks.values()) ** 0.5

    def damped(
        self, damping: Dampings, *, method: str = "exact", scale: float = 1.0
    ) -> DampedCurvature:
        """`scale * F + damping * I`, factorised once, to solve with and sample from.

        Eigendecompositions stay with the blocks, for every later damping and use, until `forget`:
        as much memory as the factors, and a number for each parameter. Factored damping, and exact
        damping of a block with one input or output, takes Cholesky decompositions in their place
        where a block has none yet: they cost a small part, and are of this one damping.

        Args:
            damping: one number, or one for each layer by name. It may be 0 where F is not
                singular; where it is, whatever inverts it raises.
            method: "exact", or "pi" for factored Tikhonov damping of the Kronecker products
                (Martens & Grosse 2015); blocks of other kinds are damped exactly under both.
            scale: `num_samples` gives the sum over the data in place of the mean.

        Raises:
            ValueError: bad arguments, or a block that is not finite or positive semi-definite, or
                is a large sum of Kronecker products; the message names the layer.
        """
        chosen = dampings(self.layers, damping, scale, method)
        blocks = by_layer(lambda layer, block: block.damped(chosen[layer]), self.blocks)
        return DampedCurvature(blocks, self.layouts)

    def solve(
        self,
        vector: Vector,
        damping: Dampings = 1e-3,
        *,
        method: str = "exact",
        scale: float = 1.0,
    ) -> dict[str, Tensor]:
        """`(scale * F + damping * I)^-1 v`; see `damped` for what is kept for the next."""
        return self.damped(damping, method=method, scale=scale).solve(vector)

    def sqrt_matvec(self, vector: Vector, damping: Dampings = 0.0) -> dict[str, Tensor]:
        """`(F + damping * I)^1/2 v`, with the symmetric root."""
        return self.damped(damping).sqrt_matvec(vector)

    def inverse_sqrt_matvec(self, vector: Vector, damping: Dampings = 1e-3) -> dict[str, Tensor]:
        """`(F + damping * I)^-1/2 v`, with the symmetric root."""
        return self.damped(damping).inverse_sqrt_matvec(vector)

    def logdet(
        self, damping: Dampings = 1e-3, *, method: str = "exact", scale: float = 1.0
    ) -> float:
        """`ln det (scale * F + damping * I)`."""
        return self.damped(damping, method=method, scale=scale).logdet()

    def sample(
        self,
        num: int = 1,
        damping: Dampings = 1e-3,
        *,
        scale: float = 1.0,
        seed: int = 0,
        generator: torch.Generator | None = None,
    ) -> dict[str, Tensor]:
        """Draws from N(0, (scale * F + damping * I)^-1), (num, *shape) by parameter name.

        With `scale=num_samples` and the prior's precision as damping, these are draws around the
        mean of the Laplace posterior. See `DampedCurvature.sample` for seed and generator.
        """
        return self.damped(damping, scale=scale).sample(num, seed=seed, generator=generator)

    def compare(self, other: Curvature) -> dict[str, Comparison]:
        """How far another curvature of the same layers is from this one, layer by layer.

        From inner products of the blocks, of any kinds, in float64 and without forming F.

        Raises:
            ValueError: other layers, or blocks of other shapes.
        """
        self._check_same_layers(other)
        return by_layer(lambda layer, block: compared(block, other[layer]), self.blocks)

    def __add__(self, other: Curvature) -> Curvature:
        """The mean Fisher over the samples of both, each weighted by its `num_samples`.

        Kronecker products merge to the closest product of the weighted sum (Algorithm 1, in closed
        form), sums of them to the closest sum of the larger rank, diagonal and dense blocks
        exactly. The relative errors of the two say nothing of the result's, which is left out.

        Raises:
            ValueError: other layers, kinds of block or eigenbases, or no samples.
        """
        if not isinstance(other, Curvature):
            return NotImplemented
        self._check_same_layers(other)
        total = self.num_samples + other.num_samples
        if total < 1:
            raise ValueError("neither curvature has any samples to weigh it by")
        shares = self.num_samples / total, other.num_samples / total
        blocks = by_layer(lambda layer, block: merged(block, other[layer], shares), self.blocks)
        return Curvature(
            blocks,
            total,
            self.layouts,
            other.skipped | self.skipped,
            self.estimator if self.estimator == other.estimator else "",
            self.fisher if self.fisher == other.fisher else "",
            self.seed if self.seed == other.seed else None,
            self.counts if self.counts == other.counts else {},
        )

    def __mul__(self, factor: float) -> Curvature:
        """Every block times a number that is not negative."""
        if isinstance(factor, bool) or not isinstance(factor, (int, float)):
            return NotImplemented
        if not 0 <= factor < float("inf"):
            raise ValueError(f"the factor must be finite and not negative, found {factor}")
        blocks = {layer: block.scaled(factor) for layer, block in self.blocks.items()}
        return replace(self, blocks=blocks)

    __rmul__ = __mul__

    def flatten(self, vector: Vector) -> Tensor:
        """One vector (..., P) from a dict: layer by layer, parameter by parameter, row-major.

        The order is that of `parameters`; where the curvature covers the whole model, it is that of
        `torch.nn.utils.parameters_to_vector(model.parameters())`.
        """
        return flattened(vector, self.layouts)

    def unflatten(self, vector: Tensor) -> dict[str, Tensor]:
        """The dict of a vector (..., P): the inverse of `flatten`."""
        return unflattened(vector, self.layouts)

    def to_linear_operator(self) -> Any:
        """F as a `scipy.sparse.linalg.LinearOperator`, (P, P), over vectors as `flatten` gives.

        It takes and gives NumPy arrays, and works in the blocks' dtype (`pip install scipy`).
        """
        return scipy_operator(self.matvec, self.layouts, self._places)

    def to(self, *args: Any, **kwargs: Any) -> Curvature:
        """The blocks on another device or in another floating-point dtype.

        As the `to` of tensors: `to("cuda")`, `to(torch.float32)`, `to(device, dtype)`, by position
        or by name, or `to(tensor)` for that tensor's.

        Raises:
            TypeError: anything else.
            ValueError: a dtype that is no floating-point one, or whose range is too small.
        """
        device, dtype = placed(*args, **kwargs)
        blocks = {layer: block.to(device, dtype) for layer, block in self.blocks.items()}
        for layer, block in blocks.items() if dtype else ():
            if not all(tensor.is_meta or tensor.isfinite().all() for tensor in block.tensors()):
                raise ValueError(f"the block of layer {layer!r} is beyond the range of {dtype}")
        return replace(self, blocks=blocks)

    def forget(self) -> None:
        """Free the eigendecompositions that `damped` and what uses it have left with the blocks."""
        for block in self.blocks.values():
            block.forget()

    def save(self, path: str | os.PathLike[str], *, factorised: bool = False) -> None:
        """Write everything to one file in the safetensors format (`pip install kfoc[io]`).

        The file is complete or not there: it is written beside its place and then moved.

        Args:
            factorised: with the eigendecompositions, made now where a block has none yet, in a
                file twice as large: what is loaded then solves without making them again.

        Raises:
            ValueError: a block that makes none of its kind, or cannot be factorised, where that is
                asked for; the message names the layer.
        """
        meta = {"num_samples": self.num_samples, "skipped": self.skipped}
        meta |= {"estimator": self.estimator, "fisher": self.fisher, "seed": self.seed}
        meta["counts"] = {name: list(count) for name, count in self.counts.items()}
        write(path, Stored(self.blocks, self.layouts, meta), factorised)

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        device: torch.device | str = "cpu",
        *,
        mmap: bool = False,
    ) -> Curvature:
        """Read what `save` wrote: equal bit by bit. Nothing is unpickled.

        With the eigendecompositions, where they were saved.

        Args:
            mmap: leave the numbers in the file, mapped to memory, on a CPU: they take no memory
                until they are used, and the file must stay as it is while the curvature is in
                use. Where it is written over, they change or the process ends.

        Raises:
            ValueError: a file that is damaged, of another format, or of a newer version.
        """
        stored = read(path, mmap)
        try:
            counts = {
                name: ParameterCount(int(size), bool(trained), str(tied))
                for name, (size, trained, tied) in stored.metadata.pop("counts").items()
            }
        except (TypeError, ValueError) as error:
            raise ValueError(f"{str(path)!r} is damaged: its counts: {error}") from error
        curvature = cls(stored.blocks, layouts=stored.layouts, counts=counts, **stored.metadata)
        return curvature.to(device)

    def __getitem__(self, layer: str) -> Block:
        try:
            return self.blocks[layer]
        except KeyError:
            reason = self.skipped.get(layer)
            known = f"it was skipped: {reason}" if reason else f"there are {list(self.blocks)}"
            raise KeyError(f"no block for layer {layer!r}; {known}") from None

    def __iter__(self) -> Iterator[str]:
        return iter(self.blocks)

    def __len__(self) -> int:
        return len(self.blocks)

    def __repr__(self) -> str:
        lines = [f"Curvature of {len(self)} layers over {self.num_samples} samples"]
        for name, block in self.blocks.items():
            o, i = block.shape
            error, itself = block.relative_error, block.fisher_error
            known = "" if error is None else f"  relative error {error:.4f}"
            if known and self.fisher.startswith("mc"):
                known += " to F of the drawn labels"
                known += "" if itself is None else f", {itself:.4f} to the Fisher itself"
            if block.report.unchecked:
                known += f"  ({block.report.unchecked} not checked)"
            lines.append(f"  {name or '(the model)'}: {type(block).__name__} {o} x {i}{known}")
        lines += [
            f"  {name or '(the model)'}: skipped, {why}" for name, why in self.skipped.items()
        ]
        return "\n".join(lines)

    @property
    def _operators(self) -> Operators:
        return {layer: block.matvec for layer, block in self.blocks.items()}

    @property
    def _places(self) -> Places:
        return {layer: (block.device, block.dtype) for layer, block in self.blocks.items()}

    def _check_same_layers(self, other: Curvature) -> None:
        if self.layouts != other.layouts:
            layers = [k for k in self.layouts if self.layouts[k] != other.layouts.get(k)]
            layers += [k for k in other.layouts if k not in self.layouts]
            raise ValueError(
                f"the two curvatures are not about the same parameters; they differ in {layers}"
            )


AnyCurvature = TypeVar("AnyCurvature", Curvature, DampedCurvature)


def of_layers(curvature: AnyCurvature, layers: Iterable[str]) -> AnyCurvature:
    """The part of a curvature that is about some of its layers, in this order."""
    kept = list(layers)
    return replace(
        curvature,
        blocks={layer: curvature.blocks[layer] for layer in kept},
        layouts={layer: curvature.layouts[layer] for layer in kept},
    )
