"""What one layer saw in one batch: inputs a and output derivatives g, by sample and position.

The per-sample gradient of a layer's extended weight `[W | b]` is
`X[s, n] = sum_t g[s,n,t] a[n,t]^T`, and its block of the Fisher is
`F = (1/N) sum_{s,n} vec(X) vec(X)^T`, with `vec` row-major. Inputs come either as a tensor or as
the patches of a convolution, which are unfolded by chunks of samples and never as a whole.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

from torch import Tensor

from kfoc.errors import out_of_memory


class LayerSamples(Protocol):
    """What every kind of samples of one layer in one batch has."""

    @property
    def num_samples(self) -> int: ...

    @property
    def num_positions(self) -> int:
        """How many outer products a per-sample gradient is the sum of; 0 where it is none."""
        ...

    @property
    def num_directions(self) -> int: ...

    @property
    def grads(self) -> Tensor:
        """For dtype and device."""
        ...

    @property
    def shape(self) -> tuple[int, int]:
        """(o, i)."""
        ...

    @property
    def magnitudes(self) -> tuple[float, float]:
        """The largest absolute values of inputs and gradients; NaN where there is one."""
        ...

    def gradients(self, start: int, stop: int) -> Tensor:
        """Per-sample gradients X, (S, n, o, i), of samples `start` to `stop`."""
        ...

    def rescaled(self) -> tuple[LayerSamples, float]:
        """The samples brought to a magnitude near one, and the factor that F then lacks.

        The factor is 0 where F is, so that it says nothing of the scale of other batches.
        """
        ...

    def silent(self, count: int) -> LayerSamples:
        """`count` samples of the same layer without any gradient."""
        ...

    def of_directions(self, chosen: slice) -> LayerSamples:
        """The same samples in some of the directions, sharing memory."""
        ...


def chunks(samples: LayerSamples, floats_per_sample: int, limit: int) -> Iterator[tuple[int, int]]:
    """Ranges of samples, each of at most `limit` floats, but of one sample at least."""
    count = samples.num_samples
    size = max(1, limit // max(1, floats_per_sample))
    for start in range(0, count, size):
        yield start, min(start + size, count)


def gradient_chunks(samples: LayerSamples, limit: int) -> Iterator[Tensor]:
    """Per-sample gradients X, (S, n, o, i), by chunks whose temporaries hold `limit` floats.

    Where memory does not suffice for a chunk, the rest goes by chunks of half its samples.
    """
    o, i = samples.shape
    per_sample = max(samples.num_directions * o * i, samples.num_positions * i)
    size, start = max(1, limit // max(1, per_sample)), 0
    while start < samples.num_samples:
        stop = min(start + size, samples.num_samples)
        found = _formed(samples, start, stop)
        if found is None:
            size = (stop - start + 1) // 2
            continue
        yield found
        del found  # or the next chunk would be formed beside it
        start = stop


def _formed(samples: LayerSamples, start: int, stop: int) -> Tensor | None:
    """The per-sample gradients; None where several do not fit into memory together."""
    try:
        return samples.gradients(start, stop)
    except (RuntimeError, MemoryError) as error:
        if stop - start == 1 or not out_of_memory(error):
            raise
    # Outside of the handler, whose traceback keeps alive what had been formed so far.
    return None
