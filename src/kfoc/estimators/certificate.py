"""How far a block is from the exact one, for any estimator, in the same single pass."""

from __future__ import annotations

import math
import zlib
from dataclasses import replace

import torch
from torch import Tensor

from kfoc.blocks import Block
from kfoc.estimators.pooling import Pooling, Sum
from kfoc.estimators.scaled import Scaled
from kfoc.estimators.tokens import add_products
from kfoc.likelihoods.draws import Draws
from kfoc.plans.base import CHUNK
from kfoc.samples.base import LayerSamples, gradient_chunks
from kfoc.samples.linear import Samples


class Probes(Scaled):
    """Products of the exact block F with a few Gaussian vectors, for one layer.

    For v ~ N(0, I), `E ||F v||^2 = ||F||^2` and `E ||(F - B) v||^2 = ||F - B||^2`, so the products
    estimate both norms without bias, whatever the approximation B, and F is never formed.

    Of drawn labels, that F is a noisy one, which B was fitted to, noise and all. Two draws more,
    F1 and F2, that B does not see tell of the Fisher itself, their mean: being independent,
    `E <F1 v - B v, F2 v - B v> = ||F - B||^2` over draws and probes, as each one's noise meets only
    what is not its own.

    Attributes:
        vectors, products: v and F v times the number of samples, (m, o, i), of the block's draws.
        unseen: `F1 v + F2 v` and `F1 v - F2 v`, (2, m, o, i); (0, m, o, i) where nothing is drawn.
            For every group of probes, each sample's two draws change places at random: the
            difference is then another one in every group, and tells how much draws matter.
        unit: the scale of both, see `Samples.rescaled`.
    """

    vectors: Tensor
    products: Tensor
    unseen: Tensor
    unit: float
    seed: int

    def __init__(
        self, count: int, seed: int, layer: str, samples: LayerSamples, drawn: bool = False
    ) -> None:
        # Drawn on the CPU in float64, so that they are the same for every device and dtype.
        self.seed = (seed ^ zlib.crc32(layer.encode())) % 2**63
        generator = torch.Generator().manual_seed(self.seed)
        vectors = torch.randn(count, *samples.shape, generator=generator, dtype=torch.float64)
        self.vectors = vectors.to(samples.grads)
        self.products = torch.zeros_like(self.vectors)
        self.unseen = self.vectors.new_zeros(2 if drawn else 0, *self.vectors.shape)
        self.unit = 0.0

    def add(self, samples: LayerSamples) -> None:
        """Add the batch's part of `F v`: `sum_{s,n} X <X, v>`."""
        self._add(self.products[None], samples, None)

    def add_unseen(self, samples: LayerSamples, first_index: int) -> None:
        """Add the batch's part at two other draws, one direction each.

        Args:
            first_index: the first sample's position in the data set.
        """
        count, device = len(self.vectors), self.vectors.device
        draws = Draws(self.seed, first_index)
        uniform = draws.uniform(samples.num_samples, _groups(count), device)
        group = torch.arange(count, device=device) % _groups(count)
        signs = uniform.sub_(0.5).sign_().to(self.vectors).mT[group]
        ones = torch.ones_like(signs)
        for draw, weights in enumerate([(ones, signs), (ones, -signs)]):
            part = samples.of_directions(slice(draw, draw + 1))
            self._add(self.unseen, part, torch.stack(weights))

    def _add(self, sums: Tensor, samples: LayerSamples, weights: Tensor | None) -> None:
        """Add `sum_{s,n} w X <X, v>` to every one of the sums.

        Args:
            sums: (k, m, o, i).
            weights: w, (k, m, n), for a single direction; None: all 1.
        """
        rescaled, scale = samples.rescaled()
        if not scale:
            return
        alpha = self.room(scale)
        if isinstance(rescaled, Samples) and rescaled.diagonal:
            for k, total in enumerate(sums):
                each = None if weights is None else weights[k]
                add_products(total, self.vectors, rescaled, alpha, each)
            return
        vectors, flat, start = self.vectors.flatten(1), sums.flatten(0, 1).flatten(1), 0
        for gradients in gradient_chunks(rescaled, CHUNK):
            rows, stop = gradients.flatten(2).flatten(0, 1), start + gradients.shape[1]
            inner = vectors @ rows.mT
            if weights is not None:
                inner = (inner * weights[..., start:stop]).flatten(0, 1)
            flat.addmm_(inner, rows, alpha=alpha)
            start = stop

    def scale(self, factor: float) -> None:
        self.products.mul_(factor)
        self.unseen.mul_(factor)

    def pooled(self) -> Pooling[None]:
        """Add up the products of all ranks."""
        yield from self.in_common_units()
        yield [Sum([self.products, *self.unseen])]

    def certified(self, block: Block, num_samples: int) -> Block:
        """The block with its errors against the F of its draws and the Fisher itself.

        An error is the root of a ratio of two means over probes. Its standard error is the delta
        method's.
        """
        exact = self.products.double() * (self.unit / num_samples)
        if not 2.0**-60 < self.unit / num_samples < 2.0**60:  # the factors' numbers may multiply to
            block_products = block.to(dtype=torch.float64).matvec(self.vectors.double())  # others
        else:
            block_products = block.matvec(self.vectors).double()
        error, deviation = _error(exact, block_products)
        report = replace(block.report, relative_error=error, standard_error=deviation)
        if len(self.unseen):
            mean, half = self.unseen.double() * (self.unit / num_samples / 2)
            error, deviation = _unbiased_error(mean, half, block_products)
            report = replace(report, fisher_error=error, fisher_error_std=deviation)
        return replace(block, report=report)


def _error(exact: Tensor, approximate: Tensor) -> tuple[float, float]:
    """`||F - B|| / ||F||` and its standard error, from F v and B v, (m, o, i) each."""
    whole, missed = (t.flatten(1).norm(dim=1).tolist() for t in (exact, exact - approximate))
    largest = max(whole)
    if not largest:
        return 0.0, 0.0
    f = torch.tensor(whole, dtype=torch.float64).div(largest).square()
    e = torch.tensor(missed, dtype=torch.float64).div(largest).square()
    ratio = (e.sum() / f.sum()).item()
    error, count = math.sqrt(ratio), len(f)
    if count == 1:
        return error, math.nan
    spread = (e - ratio * f).square().sum().item() / (count * (count - 1))
    return error, math.sqrt(spread) / f.mean().item() / (2 * error) if error else 0.0


def _unbiased_error(mean: Tensor, half: Tensor, approximate: Tensor) -> tuple[float, float]:
    """The same from two independent draws: `(F1 + F2) v / 2`, `(F1 - F2) v / 2` and B v.

    What probes scatter by is not all: the draws are the same for all of them. To first order the
    draws move `e - ratio f` by `<(F - B) v - ratio F v, F1 v + F2 v>`, and as they are two of a
    kind, their difference moves it as far as their sum: by a number `moved` that can be seen, of
    which each group of probes has one of its own.
    """
    largest = max(each.abs().max().item() for each in (mean, half, approximate))
    if not largest:
        return 0.0, 0.0
    mean, half, approximate = (t.flatten(1) / largest for t in (mean, half, approximate))
    rest, noise = mean - approximate, half.square().sum(1)
    f, e = mean.square().sum(1) - noise, rest.square().sum(1) - noise
    if not f.sum() > 0:  # nothing but noise
        return math.nan, math.nan
    ratio, count = (e.sum() / f.sum()).item(), len(f)
    error = math.sqrt(max(ratio, 0.0))
    if count == 1:
        return error, math.nan
    moved = 2 * torch.linalg.vecdot(rest - ratio * mean, half)
    spread = (e - ratio * f).square().sum().item() / (count * (count - 1))
    deviation = math.sqrt(spread + _between(moved)) / f.mean().item()
    # Up to the root of what is one standard error more: the delta method's for errors that are
    # large against it, and of use for those that are not, and for a ratio below zero.
    return error, math.sqrt(max(ratio, 0.0) + deviation) - error


def _groups(count: int) -> int:
    """Groups of probes: as many as each has probes."""
    return math.isqrt(count)


def _between(values: Tensor) -> float:
    """The variance of groups' means about zero, less what is the probes', without bias."""
    groups = [values[g :: _groups(len(values))] for g in range(_groups(len(values)))]
    each = [(group.mean() ** 2 - group.var() / len(group)).item() for group in groups]
    return max(sum(each) / len(each), 0.0)
