"""Strategies: small models of every layer family, with inputs in any memory layout."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

Draw = Callable[..., Any]


@dataclass
class Drawn:
    """A model in float64 and the arguments that it is called with, samples first."""

    model: nn.Module
    inputs: tuple[Tensor, ...]


class Network(nn.Module):
    """One layer between nonlinearities, and a head of a few outputs."""

    def __init__(self, layer: nn.Module, features: int, outputs: int, by_position: bool) -> None:
        super().__init__()
        self.layer, self.by_position = layer, by_position
        self.head = nn.Linear(features, outputs)

    def forward(self, *inputs: Tensor) -> Tensor:
        hidden = self.layer(*(x if not x.is_floating_point() else torch.sin(x) for x in inputs))
        hidden = torch.tanh(hidden if isinstance(hidden, Tensor) else hidden[0])
        return self.head(hidden if self.by_position else hidden.flatten(1))


def network(draw: Draw, layer: nn.Module, *inputs: Tensor) -> Drawn:
    """The layer in a network; where it has positions, the outputs may have them too."""
    with torch.no_grad():
        hidden = layer(*inputs)
    hidden = hidden if isinstance(hidden, Tensor) else hidden[0]
    by_position = hidden.ndim == 3 and hidden.shape[1] <= 3 and draw(st.booleans())
    features = hidden.shape[-1] if by_position else hidden[0].numel()
    outputs = draw(st.integers(1, 3))
    return Drawn(Network(layer, features, outputs, by_position).eval(), inputs)


def size(draw: Draw, most: int = 4) -> int:
    return draw(st.integers(1, most))


def linear(draw: Draw, count: int) -> Drawn:
    ins, outs = size(draw), size(draw)
    space = draw(st.sampled_from([(), (1,), (3,), (2, 2)]))
    layer = nn.Linear(ins, outs, bias=draw(st.booleans()))
    return network(draw, layer, torch.randn(count, *space, ins))


def convolution(draw: Draw, count: int) -> Drawn:
    dims = draw(st.sampled_from([1, 2, 2, 3]))
    groups = draw(st.sampled_from([1, 1, 2, 3]))
    ins, outs = groups * size(draw, 2), groups * size(draw, 2)
    kernel = [draw(st.integers(1, 3 if dims < 3 else 2)) for _ in range(dims)]
    options: dict[str, Any] = {
        "bias": draw(st.booleans()),
        "groups": groups,
        "padding_mode": draw(st.sampled_from(["zeros", "zeros", "reflect", "circular"])),
        "padding": [draw(st.integers(0, 1)) for _ in range(dims)],
        "stride": [draw(st.integers(1, 2)) for _ in range(dims)],
        "dilation": draw(st.integers(1, 2)),
    }
    layer = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1](ins, outs, kernel, **options)
    spans = [options["dilation"] * (k - 1) + 1 for k in kernel]
    space = [draw(st.integers(max(2, span), max(2, span) + 1)) for span in spans]
    return network(draw, layer, torch.randn(count, ins, *space))


def transposed(draw: Draw, count: int) -> Drawn:
    dims = draw(st.sampled_from([1, 2]))
    groups = draw(st.sampled_from([1, 2]))
    ins, outs = groups * size(draw, 2), groups * size(draw, 2)
    stride = draw(st.integers(1, 2))
    layer = (nn.ConvTranspose1d, nn.ConvTranspose2d)[dims - 1](
        ins,
        outs,
        draw(st.integers(2, 3)),
        stride=stride,
        padding=draw(st.integers(0, 1)),
        output_padding=draw(st.integers(0, stride - 1)),
        groups=groups,
        bias=draw(st.booleans()),
    )
    return network(draw, layer, torch.randn(count, ins, *[draw(st.integers(2, 3))] * dims))


def norm(draw: Draw, count: int) -> Drawn:
    features = 2 + 2 * size(draw, 2)
    shape = draw(st.sampled_from([(), (3,)]))
    layer = draw(
        st.sampled_from(
            [
                nn.LayerNorm(shape or features),
                nn.GroupNorm(2, features),
                nn.BatchNorm1d(features),
                nn.LayerNorm(shape or features, bias=False),
            ]
        )
    )
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    if isinstance(layer, nn.BatchNorm1d):
        layer.running_mean.normal_()  # type: ignore[union-attr]
        layer.running_var.uniform_(0.5, 2.0)  # type: ignore[union-attr]
    return network(draw, layer.eval(), torch.randn(count, features, *shape))


def embedding(draw: Draw, count: int) -> Drawn:
    vocabulary = draw(st.integers(1, 6))
    padding = draw(st.sampled_from([None, 0]))
    layer = nn.Embedding(vocabulary, size(draw), padding_idx=padding)
    shape = draw(st.sampled_from([(count,), (count, 1), (count, 3)]))
    return network(draw, layer, torch.randint(vocabulary, shape))


class TiedHead(nn.Module):
    """Tokens in, logits over tokens out, both by one weight."""

    def __init__(self, vocabulary: int, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.mix = nn.Linear(width, width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(torch.tanh(self.mix(self.embedding(tokens).cumsum(1))))


def tied(draw: Draw, count: int) -> Drawn:
    vocabulary = draw(st.integers(2, 4))
    model = TiedHead(vocabulary, size(draw, 3))
    return Drawn(model, (torch.randint(vocabulary, (count, draw(st.integers(1, 3)))),))


class Attention(nn.Module):
    def __init__(self, width: int, heads: int, cross: bool, bias: bool) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(width, heads, bias=bias, batch_first=True)
        self.cross = cross

    def forward(self, x: Tensor) -> Tensor:
        other = torch.flip(x, [1]) * 0.5 if self.cross else x
        return self.attention(x, other, other, need_weights=False)[0]


def attention(draw: Draw, count: int) -> Drawn:
    heads = draw(st.integers(1, 2))
    width = heads * draw(st.integers(1, 2))
    layer = Attention(width, heads, draw(st.booleans()), draw(st.booleans()))
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.5)
    return network(draw, layer.eval(), torch.randn(count, draw(st.integers(1, 3)), width))


class Loose(nn.Module):
    """A class token, a scale, and a weight used by hand."""

    def __init__(self, width: int, outputs: int) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.randn(1, 1, width))
        self.scale = nn.Parameter(torch.randn(width))
        self.weight = nn.Parameter(torch.randn(outputs, width))

    def forward(self, x: Tensor) -> Tensor:
        both = torch.cat([self.token.expand(len(x), -1, -1), x], 1) * self.scale
        return torch.sin(both) @ self.weight.mT


def loose(draw: Draw, count: int) -> Drawn:
    width = size(draw, 3)
    return network(draw, Loose(width, size(draw, 3)), torch.randn(count, size(draw, 2), width))


class Twice(nn.Module):
    """One layer called twice, or two that hold the same parameters, with another between."""

    def __init__(self, width: int, twins: bool) -> None:
        super().__init__()
        self.first, self.between = nn.Linear(width, width), nn.Linear(width, width)
        self.again = nn.Linear(width, width) if twins else self.first
        self.again.weight, self.again.bias = self.first.weight, self.first.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.again(torch.tanh(self.between(torch.sin(self.first(x)))))


def twice(draw: Draw, count: int) -> Drawn:
    width = size(draw, 3)
    space = draw(st.sampled_from([(), (3,)]))
    layer = Twice(width, draw(st.booleans()))
    return network(draw, layer, torch.randn(count, *space, width))


def recurrent(draw: Draw, count: int) -> Drawn:
    width = size(draw, 2)
    layer = draw(st.sampled_from([nn.LSTM, nn.GRU]))(width, size(draw, 2), batch_first=True)
    return network(draw, layer, torch.randn(count, size(draw, 3), width))


def bilinear(draw: Draw, count: int) -> Drawn:
    ins = size(draw, 2), size(draw, 2)
    layer = nn.Bilinear(*ins, size(draw, 3), bias=draw(st.booleans()))
    return network(draw, layer, *(torch.randn(count, i) for i in ins))


FAMILIES = {
    family.__name__: family
    for family in (
        linear,
        convolution,
        transposed,
        norm,
        embedding,
        tied,
        attention,
        loose,
        twice,
        recurrent,
        bilinear,
    )
}


def laid_out(draw: Draw, x: Tensor) -> Tensor:
    """The same values (or, expanded, the first sample's for all) in another memory layout."""
    kind = draw(st.sampled_from(["contiguous", "transposed", "strided", "expanded", "channels"]))
    if kind == "transposed":
        return x.transpose(0, -1).contiguous().transpose(0, -1)
    if kind == "strided":
        wide = torch.stack([x, torch.full_like(x, 1)], -1)
        return wide[..., 0]
    if kind == "expanded":
        return x[:1].expand_as(x)
    if kind == "channels" and x.ndim == 4:
        return x.contiguous(memory_format=torch.channels_last)
    return x


@st.composite
def models(draw: Draw, count: int) -> Drawn:
    """A model for `count` samples, with some parameters frozen now and then."""
    torch.manual_seed(draw(st.integers(0, 2**16)))
    drawn = draw(st.sampled_from(list(FAMILIES.values())))(draw, count)
    if draw(st.sampled_from([False, False, False, True])):
        parameters = list(drawn.model.parameters())
        draw(st.sampled_from(parameters)).requires_grad_(False)
    inputs = tuple(laid_out(draw, x) for x in drawn.inputs)
    return Drawn(drawn.model, inputs)
