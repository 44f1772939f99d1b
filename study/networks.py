"""Six small networks, with and without weights shared over positions, and what trains them.

The uses of a curvature (influence, pruning, natural gradients, Laplace, continual learning) are
measured on these: small enough for exact blocks, for five seeds and for training again. All take
batches `(inputs, targets)` and the categorical likelihood; a sample's loss is a sum over positions
where there is more than one target, as `kfoc` counts it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, one_hot, scaled_dot_product_attention

from borrowed import borrowed
from subjects import Data, resnet, small_digits, text

SEEDS = (0, 1, 2, 3, 4)
KINDS = ("no sharing", "convolution", "tokens and attention")
VOCABULARY, LENGTH = 28, 16


@dataclass(frozen=True)
class Network:
    """A network and all of its data, in a fixed random order.

    Attributes:
        kind: one of KINDS, how its weights are shared.
        build: a model as PyTorch initialises it; `model` seeds that.
        everything: inputs and targets, floats in float32.
    """

    name: str
    kind: str
    build: Callable[[], nn.Module]
    everything: Callable[[], Data]

    def model(self, seed: int) -> nn.Module:
        """At its initialisation, in the default dtype."""
        torch.manual_seed(seed)
        return self.build()

    def splits(self, sizes: tuple[int, ...], seed: int) -> list[Data]:
        """Disjoint parts of these sizes, drawn by the seed; floats in the default dtype."""
        inputs, targets = self.everything()
        if sum(sizes) > len(inputs):
            raise ValueError(f"{self.name} has {len(inputs)} samples, sizes ask for {sum(sizes)}")
        if inputs.is_floating_point():
            inputs = inputs.to(torch.get_default_dtype())
        order = torch.randperm(len(inputs), generator=torch.Generator().manual_seed(seed))
        parts = order[: sum(sizes)].split(sizes)
        return [(inputs[part], targets[part]) for part in parts]


def sample_losses(model: nn.Module, data: Data) -> Tensor:
    """(N,): each sample's loss, summed over its positions."""
    outputs, targets = model(data[0]), data[1]
    found = cross_entropy(outputs.flatten(0, -2), targets.flatten(), reduction="none")
    return found.view(len(targets), -1).sum(1)


def accuracy(model: nn.Module, data: Data) -> float:
    with torch.no_grad():
        return (model(data[0]).argmax(-1) == data[1]).double().mean().item()


def batches(data: Data, size: int) -> list[Data]:
    return list(zip(data[0].split(size), data[1].split(size), strict=True))


def train(
    model: nn.Module, data: Data, steps: int, seed: int,
    decay: float = 0.0, rate: float = 1e-2, batch: int = 64,
) -> nn.Module:  # fmt: skip
    """Adam on `mean loss + decay / 2 |parameters|^2`, then eval mode; the rate falls to zero.

    The order of the samples depends on the seed alone.
    """
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters(), rate, weight_decay=decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    order: list[Tensor] = []
    model.train()
    for _ in range(steps):
        order = order or list(torch.randperm(len(data[0]), generator=generator).split(batch))
        chosen = order.pop()
        optimizer.zero_grad()
        sample_losses(model, (data[0][chosen], data[1][chosen])).mean().backward()
        optimizer.step()
        schedule.step()
    model.zero_grad(set_to_none=True)
    return model.eval()


def minimise(
    parameters: list[Tensor], objective: Callable[[], Tensor], steps: int, gradient: float
) -> None:
    """L-BFGS on a deterministic objective, from where the parameters are.

    Args:
        gradient: where its largest entry is smaller, the minimum has been found.
    """
    optimizer = torch.optim.LBFGS(
        parameters, max_iter=steps, history_size=30, tolerance_grad=gradient, tolerance_change=0.0,
        line_search_fn="strong_wolfe",
    )  # fmt: skip

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = objective()
        loss.backward()
        return loss

    optimizer.step(closure)
    optimizer.zero_grad()


class Tokens(nn.Module):
    """Rows of an image, (N, 1, 8, 8), as tokens: each its pixels and its place, one-hot."""

    def forward(self, images: Tensor) -> Tensor:
        rows = images.flatten(1, 2)
        places = one_hot(torch.arange(rows.shape[1], device=rows.device)).to(rows)
        return torch.cat([rows, places.expand(len(rows), -1, -1)], -1)


class Pool(nn.Module):
    """The mean over tokens."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(1)


class Attention(nn.Module):
    """A block of attention with two heads and an MLP, each around a shortcut; not causal."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = (
            part.unflatten(-1, (2, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1)
        )
        attended = scaled_dot_product_attention(query, key, value)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        return x + self.down(torch.tanh(self.up(x)))


def mlp() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 12), nn.Tanh(), nn.Linear(12, 10))


def cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1),
        nn.Tanh(),
        nn.AvgPool2d(2),
        nn.Conv2d(4, 8, 3, padding=1),
        nn.Tanh(),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.Linear(32, 10),
    )


def tokens() -> nn.Module:
    width = 12
    return nn.Sequential(
        Tokens(), nn.Linear(16, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), Pool(),
        nn.Linear(width, 10),
    )  # fmt: skip


def encoder() -> nn.Module:
    width = 8
    return nn.Sequential(
        Tokens(), nn.Linear(16, width), Attention(width), Pool(), nn.Linear(width, 10)
    )


def gpt() -> nn.Module:
    build = borrowed("benchmarks/networks.py").GPT
    return build(VOCABULARY, LENGTH, width=12, heads=2, depth=1)


def letters() -> Data:
    """Pieces of `subjects.text`: its letters, as small ones, spaces, and one mark for the rest."""
    pieces, following = text(LENGTH)

    def folded(codes: Tensor) -> Tensor:
        code = codes + 31  # of ASCII
        code = torch.where((code >= 65) & (code <= 90), code + 32, code)
        letter = (code >= 97) & (code <= 122)
        return torch.where(letter, code - 95, (code != 32).long())

    return folded(pieces), folded(following)


NETWORKS = {
    network.name: network
    for network in (
        Network("MLP", KINDS[0], mlp, small_digits),
        Network("CNN", KINDS[1], cnn, small_digits),
        Network("ResNet", KINDS[1], lambda: resnet(4), small_digits),
        Network("tokens", KINDS[2], tokens, small_digits),
        Network("encoder", KINDS[2], encoder, small_digits),
        Network("GPT", KINDS[2], gpt, letters),
    )
}
