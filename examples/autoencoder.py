"""A convolutional autoencoder with a Gaussian likelihood: the targets are the inputs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from common import Example, Row, images, report, run, train


def autoencoder(channels: int, side: int, width: int, code: int) -> nn.Sequential:
    coarse = 2 * width * (side // 4) ** 2
    return nn.Sequential(
        nn.Conv2d(channels, width, 4, stride=2, padding=1),
        nn.GELU(),
        nn.Conv2d(width, 2 * width, 4, stride=2, padding=1),
        nn.GELU(),
        nn.Flatten(),
        nn.Linear(coarse, code),
        nn.Linear(code, coarse),
        nn.GELU(),
        nn.Unflatten(1, (2 * width, side // 4, side // 4)),
        nn.ConvTranspose2d(2 * width, width, 4, stride=2, padding=1),
        nn.GELU(),
        nn.ConvTranspose2d(width, channels, 4, stride=2, padding=1),
    )


def loss(model: nn.Module, batch: Any) -> Tensor:
    """-ln p of unit variance around the outputs, up to a constant, in the mean over samples."""
    inputs, targets = batch
    return 0.5 * (model(inputs) - targets).pow(2).sum() / len(inputs)


def build(small: bool = False) -> Example:
    torch.manual_seed(0)
    count, side, width, code = (8, 8, 2, 3) if small else (128, 32, 16, 32)
    x, _ = images(count, 1 if small else 3, side, classes=4)
    size = count // 2 if small else 32
    batches = [(part, part) for part in x.split(size)]
    model = autoencoder(x.shape[1], side, width, code)
    train(model, loss, batches)
    return Example("autoencoder", model, batches, loss, likelihood="gaussian")


def main(small: bool = False) -> Row:
    return report(build(small))


if __name__ == "__main__":
    run(main, __doc__)
