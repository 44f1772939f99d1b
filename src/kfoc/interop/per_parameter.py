"""Weight and bias apart: what libraries want that keep a factorisation per parameter."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from kfoc.blocks import Block, DampedBlock, Damping, DenseBlock
from kfoc.errors import Footprint
from kfoc.estimators import KFOC, Estimator
from kfoc.estimators.base import State
from kfoc.estimators.pooling import Pooling
from kfoc.layers.rule import Unsupported, checked_treatment
from kfoc.linalg.products import add_symmetric, mirrored
from kfoc.parameters.layout import Layout
from kfoc.samples.base import LayerSamples
from kfoc.samples.inputs import Rows
from kfoc.samples.linear import Samples
from kfoc.samples.patches import Patches


def per_parameter(model: nn.Module, base: Estimator | None = None) -> PerParameter:
    """The estimator that treats every weight without its bias, for the layers of `model`.

    Args:
        base: KFOC() by default; its blocks are then of the weights alone.
    """
    biased = []
    for name, module in model.named_modules():
        try:
            parameters = checked_treatment(module).parameters
        except Unsupported:
            continue
        if parameters == ("weight", "bias"):
            biased.append(name)
    return PerParameter(frozenset(biased), KFOC() if base is None else base)


@dataclass(frozen=True)
class PerParameter(Estimator):
    """The base's block of the weight alone, and the exact block of the bias (`SplitBlock`).

    Of all blocks without a covariance between weight and bias that have one Kronecker product for
    the weight, this is the closest to F where the base is K-FOC. Layers without a bias, and those
    that are not linear maps (normalisation), keep the base's block.

    Attributes:
        biased: the names of the layers whose last input column is a bias (see `per_parameter`).
        base: any estimator.
    """

    biased: frozenset[str]
    base: Estimator = field(default_factory=KFOC)

    def check(self) -> None:
        if not isinstance(self.base, Estimator):
            raise ValueError(f"base must be an estimator such as kfoc.KFOC(), found {self.base!r}")
        self.base.check()

    @property
    def pass_limit(self) -> int:
        return self.base.pass_limit

    @property
    def largest_factor(self) -> int | None:
        return self.base.largest_factor

    def sized(self, layouts: Mapping[str, Layout]) -> PerParameter:
        return replace(self, base=self.base.sized(layouts))

    def streaming(self) -> PerParameter:
        return replace(self, base=self.base.streaming())

    def begin(self, layer: str, samples: LayerSamples) -> State:
        if layer not in self.biased or not isinstance(samples, Samples):
            return self.base.begin(layer, samples)
        o, _ = samples.shape
        base = self.base.begin(layer, _without_bias(samples))
        return _State(base, samples.grads.new_zeros(o, o))

    def footprint(self, samples: LayerSamples) -> Footprint:
        # Which layer it is cannot be told: with the bias it is the larger one.
        o, _ = samples.shape
        bias = o * o * samples.grads.element_size()
        return self.base.footprint(samples) + Footprint(bias, bias)


@dataclass
class _State(State):
    base: State
    bias: Tensor  # sums of the bias's outer products, on and above the diagonal
    complete: bool = False  # a pass is over, and the bias has seen all samples

    def add(self, samples: Samples, alone: bool) -> None:
        if not self.complete:
            rows = samples.grads.sum(2).flatten(0, 1)  # a bias has the gradient `sum_t g`
            add_symmetric(self.bias, rows, rows)
        self.base.add(_without_bias(samples), alone)

    def next_pass(self) -> bool:
        self.complete = True
        return self.base.next_pass()

    def change(self) -> float | None:
        return self.base.change()

    def totals(self) -> list[Tensor]:
        return [] if self.complete else [self.bias]

    def decay(self, factor: float) -> None:
        super().decay(factor)
        self.base.decay(factor)

    def pooled(self) -> Pooling[None]:
        yield from super().pooled()
        yield from self.base.pooled()

    def block(self, num_samples: float) -> Block:
        block = self.base.block(num_samples)
        bias = DenseBlock(mirrored(self.bias) / num_samples, (len(self.bias), 1))
        # The base's error is of the weight alone.
        report = replace(block.report, relative_error=None, standard_error=None)
        return SplitBlock((block, bias), report=report)


@dataclass(frozen=True)
class SplitBlock(Block):
    """Blocks of ranges of the matrix's columns, with nothing between them.

    Attributes:
        parts_by_column: of the weight (o, i - 1) and of the bias (o, 1).
    """

    parts_by_column: tuple[Block, Block]

    @property
    def weight(self) -> Block:
        return self.parts_by_column[0]

    @property
    def bias(self) -> Block:
        return self.parts_by_column[1]

    @property
    def shape(self) -> tuple[int, int]:
        o, i = self.weight.shape
        return o, i + 1

    def to_dense(self) -> Tensor:
        o, i = self.shape
        places = torch.arange(o * i).view(o, i)
        dense = self.bias.to_dense().new_zeros(o * i, o * i)
        for block, columns in zip(self.parts_by_column, (slice(-1), slice(-1, None)), strict=True):
            at = places[:, columns].flatten().to(dense.device)
            dense[at[:, None], at] = block.to_dense()
        return dense

    def matvec(self, vectors: Tensor) -> Tensor:
        self._check_vectors(vectors)
        weight, bias = self.weight.matvec(vectors[..., :-1]), self.bias.matvec(vectors[..., -1:])
        return torch.cat([weight, bias], -1)

    def trace(self) -> float:
        return self.weight.trace() + self.bias.trace()

    def scaled(self, factor: float) -> SplitBlock:
        parts = self.weight.scaled(factor), self.bias.scaled(factor)
        return replace(self, parts_by_column=parts)

    def inner(self, other: Block) -> float:
        if isinstance(other, SplitBlock):
            return self.weight.inner(other.weight) + self.bias.inner(other.bias)
        return (self.to_dense() * other.to_dense()).sum().item()

    def inner_kronecker(self, left: Tensor, right: Tensor) -> Tensor:
        inside = (slice(-1),) * right.ndim
        corner = (slice(-1, None),) * right.ndim
        weight = self.weight.inner_kronecker(left, right[inside])
        return weight + self.bias.inner_kronecker(left, right[corner])

    def diagonal_in(self, left: Tensor | None, right: Tensor | None) -> Tensor:
        weight = self.weight.diagonal_in(left, None if right is None else right[:-1])
        bias = self.bias.diagonal_in(left, None if right is None else right[-1:])
        return torch.cat([weight, bias], -1) if right is None else weight + bias

    def damped(self, damping: Damping) -> DampedSplit:
        return DampedSplit(self.weight.damped(damping), self.bias.damped(damping))


@dataclass(frozen=True)
class DampedSplit(DampedBlock):
    """Weight and bias damped each on its own."""

    weight: DampedBlock
    bias: DampedBlock

    @property
    def dtype(self) -> torch.dtype:
        return self.weight.dtype

    @property
    def shape(self) -> tuple[int, int]:
        o, i = self.weight.shape
        return o, i + 1

    @property
    def device(self) -> torch.device:
        return self.weight.device

    def power(self, vectors: Tensor, exponent: float) -> Tensor:
        weight = self.weight.power(vectors[..., :-1], exponent)
        return torch.cat([weight, self.bias.power(vectors[..., -1:], exponent)], -1)

    def draw(self, noise: Tensor) -> Tensor:
        return torch.cat([self.weight.draw(noise[..., :-1]), self.bias.draw(noise[..., -1:])], -1)

    def logdet(self) -> float:
        return self.weight.logdet() + self.bias.logdet()

    def redamped(self, damping: Damping) -> DampedSplit:
        return DampedSplit(self.weight.redamped(damping), self.bias.redamped(damping))


def _without_bias(samples: Samples) -> Samples:
    """The same samples for the weight alone."""
    inputs = samples.inputs
    if isinstance(inputs, Patches | Rows) and inputs.constant is not None:
        return replace(samples, inputs=replace(inputs, constant=None))
    return replace(samples, inputs=inputs.with_tensor(inputs.tensor[..., :-1]))
