"""The exact block of every layer."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from kfoc.blocks import DenseBlock
from kfoc.errors import Footprint
from kfoc.estimators.base import Estimator, State
from kfoc.linalg.products import mirrored
from kfoc.plans.explicit import add_fisher
from kfoc.samples.base import LayerSamples


@dataclass
class _State(State):
    matrix: Tensor  # (o * i, o * i), summed over the samples
    shape: tuple[int, int]

    def add(self, samples: LayerSamples, alone: bool) -> None:
        add_fisher(self.matrix, samples)

    def totals(self) -> list[Tensor]:
        return [self.matrix]

    def block(self, num_samples: float) -> DenseBlock:
        return DenseBlock(mirrored(self.matrix) / num_samples, self.shape)


@dataclass(frozen=True)
class BlockDiagonal(Estimator):
    """Every layer's block as a dense (o * i, o * i) matrix: exact, and for small layers only.

    Attributes:
        max_size: the largest o * i allowed; memory is its square (4,096: 64 MiB in float32).
    """

    max_size: int = 4096

    def begin(self, layer: str, samples: LayerSamples) -> State:
        o, i = samples.shape
        if o * i > self.max_size:
            raise ValueError(
                f"layer {layer!r} has {o} x {i} = {o * i} parameters, and its exact block would "
                f"have {o * i}^2 entries: pass BlockDiagonal(max_size={o * i}) if that is meant, "
                "or leave the layer out by layers=..."
            )
        return _State(samples.grads.new_zeros(o * i, o * i), (o, i))

    def footprint(self, samples: LayerSamples) -> Footprint:
        o, i = samples.shape
        size = (o * i) ** 2 * samples.grads.element_size()
        return Footprint(size, size)
