"""Networks with their data and stages of training, and those on which inverses are looked at."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from borrowed import borrowed

Data = tuple[Tensor, Tensor]
BATCH = 64
RATE = 3e-3


@dataclass(frozen=True)
class Subject:
    """A network and its data; training snapshots after so many steps of Adam.

    Attributes:
        fisher: of the model's own labels: exact where that is cheap enough.
    """

    name: str
    build: Callable[[], nn.Module]
    data: Callable[[], Data]
    stages: dict[str, int]
    fisher: str = "mc"


def small_digits() -> Data:
    """scikit-learn's digits, (1797, 1, 8, 8), in a fixed random order, and their labels."""
    images, labels = borrowed("examples/natural_gradient.py").digits()
    return images.view(-1, 1, 8, 8), labels


def text(length: int = 32) -> Data:
    """Pieces of Python's language reference as `pydoc` ships it; every next character.

    Characters are those of ASCII from space on, and one for all others.
    """
    from pydoc_data.topics import topics

    whole = "".join(topics[key] for key in sorted(topics))[:100_000]
    codes = torch.tensor([ord(c) - 31 if 32 <= ord(c) < 127 else 0 for c in whole])
    pieces = codes[: len(codes) // (length + 1) * (length + 1)].view(-1, length + 1)
    order = torch.randperm(len(pieces), generator=torch.Generator().manual_seed(0))
    return pieces[order, :-1], pieces[order, 1:]


def mlp(*widths: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), *borrowed("benchmarks/networks.py").mlp(*widths))


def resnet(channels: int = 8) -> nn.Module:
    """Two residual blocks for images of 8 x 8."""
    block = borrowed("benchmarks/networks.py").ResidualBlock
    return nn.Sequential(
        nn.Conv2d(1, channels, 3, padding=1, bias=False),
        nn.BatchNorm2d(channels),
        nn.ReLU(),
        block(channels, channels, 1),
        block(channels, 2 * channels, 2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(2 * channels, 10),
    )


def cnn() -> nn.Module:
    """Small enough for the exact blocks of all layers."""
    return nn.Sequential(
        nn.Conv2d(1, 6, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(6, 12, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(48, 10),
    )


def gpt(width: int, depth: int) -> nn.Module:
    return borrowed("benchmarks/networks.py").GPT(96, 32, width=width, heads=2, depth=depth)


STAGES = {"init": 0, "early": 20, "trained": 600}
SMALL = (
    Subject("small MLP", lambda: mlp(64, 14, 14, 10), small_digits, STAGES, "exact"),
    Subject("small CNN", cnn, small_digits, STAGES, "exact"),
    Subject("small GPT", lambda: gpt(10, 1), text, STAGES),
)


def layers(model: nn.Module) -> list[str]:
    """Linear and convolutional layers: those of which a Kronecker product is an approximation."""
    return [n for n, m in model.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))]


def small_layers(model: nn.Module, largest: int) -> list[str]:
    """The layers of so many parameters at most."""
    modules = {name: model.get_submodule(name) for name in layers(model)}
    return [
        name
        for name, module in modules.items()
        if sum(parameter.numel() for parameter in module.parameters()) <= largest
    ]


def loss(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    outputs = model(inputs)
    return cross_entropy(outputs.flatten(0, -2), targets.flatten())


def trained(subject: Subject, seed: int, quick: bool = False) -> Iterator[tuple[str, nn.Module]]:
    """The stages of one run of training: their names, and copies in evaluation mode.

    The first forward passes leave BatchNorm statistics, and nothing else, before "init".
    """
    torch.manual_seed(seed)
    inputs, targets = subject.data()
    model = subject.build().train()
    optimizer = torch.optim.Adam(model.parameters(), RATE)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for part in inputs[: 30 * BATCH].split(BATCH):
            model(part)
    step, order = 0, []
    for stage, until in subject.stages.items():
        while step < (until // 10 if quick else until):
            order = order or list(torch.randperm(len(inputs), generator=generator).split(BATCH))
            chosen = order.pop()
            optimizer.zero_grad()
            loss(model, inputs[chosen], targets[chosen]).backward()
            optimizer.step()
            step += 1
        snapshot = copy.deepcopy(model)
        snapshot.zero_grad(set_to_none=True)
        yield stage, snapshot.eval()
