"""Whether a layer's samples add up to autograd's gradient of its parameters; see `proof`."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kfoc.layers.selection import Selection
from kfoc.linalg.scaling import magnitude, power_of_two, wide
from kfoc.model.ownership import Directions, Rule
from kfoc.model.to_samples import samples_of
from kfoc.model.trace import Call, coarsest, tolerance
from kfoc.parameters.layout import Layout
from kfoc.samples.base import LayerSamples
from kfoc.samples.grouped import Grouped
from kfoc.samples.linear import Samples
from kfoc.samples.one_hot import OneHot

# Random weightings of a layer's sum that show its size before cancellation.
_WEIGHTINGS = 4


@dataclass
class Evidence:
    """What the passes gave of one layer.

    Attributes:
        calls: of the layer.
        grads: per call, the derivative by what it put out; None where there is no path.
        tagged: per call and weighted pass, the same by weighted cotangents.
        totals: autograd's gradients of the parameters; None where they are sharded.
    """

    calls: list[Call]
    grads: list[Tensor | None]
    tagged: list[list[Tensor | None]]
    totals: list[Tensor | None] | None


def adds_up(
    evidence: Evidence,
    rules: list[Rule],
    selection: Selection,
    name: str,
    count: int,
    generator: torch.Generator,
) -> bool:
    """Whether the samples' gradients add up to those of autograd, relative to what cancels."""
    calls = [replace(call, rows=None) for call in evidence.calls]  # as the derivatives are by now

    def samples_with(weightings: int) -> LayerSamples:
        directions: Directions = []
        for grad in evidence.grads:
            own = None if grad is None else wide(grad)
            random = [_scrambled(own, generator) for _ in range(weightings)]
            directions.append([own, *random])
        return samples_of(calls, directions, count, rules)

    samples = samples_with(0)
    if evidence.totals is None:
        return True
    parameters = list(selection.layer(name).parameters.values())
    totals = [
        torch.zeros_like(parameter) if total is None else total.to_dense()
        for parameter, total in zip(parameters, evidence.totals, strict=True)
    ]
    vectors, expected = _expected(selection.layout(name), totals, samples, generator)
    if _sums_rows(samples):
        found, sizes = _images(samples, vectors)[0], _images(samples, vectors, sizes=True)[0]
        scale = torch.hypot(found.double().norm(dim=0), sizes.norm(dim=0))
    else:
        every = _images(samples_with(_WEIGHTINGS), vectors)
        found, scale = every[0], every.double().square().sum(1).mean(0).sqrt()
    off = (found - expected).double().norm(dim=0)
    kinds = [kind for call in calls for kind in (call.value.dtype, call.output_dtype)]
    precision = coarsest([*kinds, *(parameter.dtype for parameter in parameters)])
    allowed = tolerance(precision, expected.device) * scale
    # Below the range of a type, nothing is known of its numbers' digits.
    return bool((off <= allowed + len(found) * torch.finfo(expected.dtype).tiny).all())


def _expected(
    layout: Layout, totals: list[Tensor], samples: LayerSamples, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Vectors (i, c) for the rows of per-sample gradients, and autograd's gradient times them.

    A column for the weight, summed up at random, and one for every other parameter.

    Raises:
        ValueError: the layer's parameters lie in another shape than its samples.
    """
    if samples.shape != layout.shape:
        raise ValueError(
            f"its treatment makes gradients of the shape {samples.shape}, and its parameters "
            f"{', '.join(layout.names)} lie as {layout.shape} (layout={layout.kind!r}?)"
        )
    size, like = samples.shape[1], samples.grads
    if layout.kind == "stacked":
        named = dict(zip(layout.names, totals, strict=True))
        return torch.eye(size).to(like), layout.join(named).to(like)
    bias = len(totals) > 1
    vector = torch.randn(size - bias, generator=generator, dtype=torch.float64).to(like)
    vectors = like.new_zeros(size, 1 + bias)
    vectors[: size - bias, 0] = vector
    alone = replace(layout, names=layout.names[:1], shapes=layout.shapes[:1])  # without a copy
    columns = [alone.join({layout.names[0]: totals[0]}).to(like) @ vector]
    if bias:
        vectors[-1, 1] = 1.0
        columns.append(totals[1].to(like))
    return vectors, torch.stack(columns, -1)


def _scrambled(grad: Tensor | None, generator: torch.Generator) -> Tensor | None:
    """A derivative with random weights along every dimension, so that nothing in it cancels."""
    if grad is None:
        return None
    for axis, size in enumerate(grad.shape):
        weights = torch.rand(size, generator=generator, dtype=torch.float64) + 0.5
        weights *= torch.randint(2, (size,), generator=generator) * 2 - 1
        grad = grad * weights.to(grad).view(-1, *[1] * (grad.ndim - axis - 1))
    return grad


def _sums_rows(samples: LayerSamples) -> bool:
    """Whether per-sample gradients are sums of outer products, of which each can be seen."""
    if isinstance(samples, Grouped):
        return all(map(_sums_rows, samples.groups))
    return isinstance(samples, Samples)


def _images(samples: LayerSamples, vectors: Tensor, *, sizes: bool = False) -> Tensor:
    """The per-sample gradients' sum over all samples, (S, o, i), times `vectors` (i, c).

    Args:
        sizes: the root of the sum of squares of that sum's terms, the rows, in its place: its size,
            were there no cancellation between them.
    """
    if isinstance(samples, Grouped):
        return torch.cat([_images(g, vectors, sizes=sizes) for g in samples.groups], 1)
    if not isinstance(samples, Samples):
        return samples.gradients(0, samples.num_samples).sum(1) @ vectors
    inputs, grads = samples.inputs, samples.grads
    if isinstance(inputs, OneHot):  # without its rows, as long as the vocabulary
        known = (inputs.tokens >= 0)[..., None].to(vectors)
        seen = vectors[inputs.tokens.long().clamp_min(0)] * known * inputs.scale
    else:
        seen = inputs.rows(0, samples.num_samples).to(vectors) @ vectors
    grads, seen = grads.flatten(1, 2).mT, seen.flatten(0, 1)
    if not sizes:
        return torch.matmul(grads, seen)
    scales = power_of_two(magnitude(grads)), power_of_two(magnitude(seen))
    squares = torch.matmul((grads / scales[0]).square(), (seen / scales[1]).square())
    return squares.double().sqrt() * scales[0] * scales[1]
