"""How far a block is from the exact one, for any estimator, in the same single pass."""

from __future__ import annotations

import math
import zlib
from dataclasses import replace

import torch
from torch import Tensor

from kfoc.blocks import Block
from kfoc.plans import CHUNK
from kfoc.pooling import Pooling, Sum, largest
from kfoc.samples import LayerSamples, Samples, gradient_chunks
from kfoc.token_plan import add_products


class Probes:
    """Products of the exact block F with a few Gaussian vectors, for one layer.

    For v ~ N(0, I), `E ||F v||^2 = ||F||^2` and `E ||(F - B) v||^2 = ||F - B||^2`, so the products
    estimate both norms without bias, whatever the approximation B, and F is never formed.
    """

    vectors: Tensor
    products: Tensor
    unit: float

    def __init__(self, count: int, seed: int, layer: str, samples: LayerSamples) -> None:
        # Drawn on the CPU in float64, so that they are the same for every device and dtype.
        generator = torch.Generator().manual_seed((seed ^ zlib.crc32(layer.encode())) % 2**63)
        vectors = torch.randn(count, *samples.shape, generator=generator, dtype=torch.float64)
        self.vectors = vectors.to(samples.grads)
        self.products = torch.zeros_like(self.vectors)
        self.unit = 0.0  # the scale of `products`, see `Samples.rescaled`

    def add(self, samples: LayerSamples) -> None:
        """Add the batch's part of `F v`: `sum_{s,n} X <X, v>`."""
        rescaled, scale = samples.rescaled()
        if not scale:
            return
        o, i = samples.shape
        if scale > self.unit:
            self.products *= self.unit / scale
            self.unit = scale
        if isinstance(rescaled, Samples) and rescaled.diagonal:
            add_products(self.products, self.vectors, rescaled, scale / self.unit)
            return
        vectors, products = self.vectors.flatten(1), self.products.flatten(1)
        for gradients in gradient_chunks(rescaled, CHUNK):
            rows = gradients.reshape(-1, o * i)
            products.addmm_(vectors @ rows.mT, rows, alpha=scale / self.unit)

    def pooled(self) -> Pooling[None]:
        """Add up the products of all ranks."""
        (unit,) = yield from largest(self.unit)
        self.products *= self.unit / (unit or 1.0)
        self.unit = unit
        yield [Sum([self.products])]

    def certified(self, block: Block, num_samples: int) -> Block:
        """The block with its relative error and that number's standard error.

        The error is the root of a ratio of two means over probes; the standard error is the delta
        method's for it.
        """
        exact = self.products.double() * (self.unit / num_samples)
        if not 2.0**-60 < self.unit / num_samples < 2.0**60:  # the factors' numbers may multiply to
            block_products = block.to(dtype=torch.float64).matvec(self.vectors.double())  # others
        else:
            block_products = block.matvec(self.vectors).double()
        rest = exact - block_products
        whole, missed = (t.flatten(1).norm(dim=1).tolist() for t in (exact, rest))
        largest = max(whole)
        if not largest:
            return replace(
                block, report=replace(block.report, relative_error=0.0, standard_error=0.0)
            )
        f = torch.tensor(whole, dtype=torch.float64).div(largest).square()
        e = torch.tensor(missed, dtype=torch.float64).div(largest).square()
        ratio = (e.sum() / f.sum()).item()
        error, count = math.sqrt(ratio), len(f)
        deviation = math.nan
        if count > 1:
            spread = (e - ratio * f).square().sum().item() / (count * (count - 1))
            deviation = math.sqrt(spread) / f.mean().item() / (2 * error) if error else 0.0
        report = replace(block.report, relative_error=error, standard_error=deviation)
        return replace(block, report=report)
