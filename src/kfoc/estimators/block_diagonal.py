"""The exact block of every layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from kfoc.blocks import DenseBlock
from kfoc.errors import Footprint
from kfoc.estimators.base import Estimator
from kfoc.estimators.pooling import Pooling, Sum
from kfoc.linalg.products import mirrored
from kfoc.plans.explicit import add_fisher
from kfoc.samples.base import LayerSamples


class _State(NamedTuple):
    matrix: Tensor
    shape: tuple[int, int]


@dataclass(frozen=True)
class BlockDiagonal(Estimator):
    """Every layer's block as a dense (o * i, o * i) matrix: exact, and for small layers only.

    Attributes:
        max_size: the largest o * i allowed; memory is its square (4,096: 64 MiB in float32).
    """

    max_size: int = 4096

    def init(self, layer: str, samples: LayerSamples) -> _State:
        o, i = samples.shape
        if o * i > self.max_size:
            raise ValueError(
                f"layer {layer!r} has {o} x {i} = {o * i} parameters, and its exact block would "
                f"have {o * i}^2 entries: pass BlockDiagonal(max_size={o * i}) if that is meant, "
                "or leave the layer out by layers=..."
            )
        return _State(samples.grads.new_zeros(o * i, o * i), (o, i))

    def update(self, state: _State, samples: LayerSamples, *, alone: bool) -> _State:
        add_fisher(state.matrix, samples)
        return state

    def footprint(self, samples: LayerSamples) -> Footprint:
        o, i = samples.shape
        size = (o * i) ** 2 * samples.grads.element_size()
        return Footprint(size, size)

    def decayed(self, state: _State, factor: float) -> _State:
        state.matrix.mul_(factor)
        return state

    def pooled(self, state: _State) -> Pooling[_State]:
        yield [Sum([state.matrix])]
        return state

    def finish(self, state: _State, num_samples: float) -> DenseBlock:
        return DenseBlock(mirrored(state.matrix) / num_samples, state.shape)
