"""A U-Net: down by strided convolutions, up by transposed ones, a label for every pixel."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from common import Example, Row, report, run, train


def convolved(ins: int, outs: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(ins, outs, 3, padding=1), nn.GroupNorm(1, outs), nn.SiLU())


class UNet(nn.Module):
    """Logits (N, classes, H, W) from images (N, channels, H, W); H and W multiples of 4."""

    def __init__(self, channels: int, classes: int, width: int) -> None:
        super().__init__()
        self.enter = convolved(channels, width)
        self.down1 = nn.Conv2d(width, 2 * width, 2, stride=2)
        self.level1 = convolved(2 * width, 2 * width)
        self.down2 = nn.Conv2d(2 * width, 4 * width, 2, stride=2)
        self.level2 = convolved(4 * width, 4 * width)
        self.up2 = nn.ConvTranspose2d(4 * width, 2 * width, 2, stride=2)
        self.merge1 = convolved(4 * width, 2 * width)
        self.up1 = nn.ConvTranspose2d(2 * width, width, 2, stride=2)
        self.merge0 = convolved(2 * width, width)
        self.head = nn.Conv2d(width, classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        fine = self.enter(x)
        middle = self.level1(self.down1(fine))
        coarse = self.level2(self.down2(middle))
        middle = self.merge1(torch.cat([self.up2(coarse), middle], 1))
        fine = self.merge0(torch.cat([self.up1(middle), fine], 1))
        return self.head(fine)


def shapes(count: int, side: int, classes: int) -> tuple[Tensor, Tensor]:
    """Noisy images (count, 1, side, side) of a rectangle of one class, and a label for each pixel.

    The border has no label: -100, as nn.CrossEntropyLoss ignores it.
    """
    generator = torch.Generator().manual_seed(0)
    labels = torch.zeros(count, side, side, dtype=torch.long)
    for image in labels:
        top, left = torch.randint(1, side // 2, (2,), generator=generator).tolist()
        kind = torch.randint(1, classes, (), generator=generator).item()
        image[top : top + side // 2, left : left + side // 2] = kind
    noise = torch.randn(count, 1, side, side, generator=generator)
    pixels = (labels[:, None] + 0.5 * noise).to(torch.get_default_dtype())
    labels[:, 0], labels[:, -1], labels[:, :, 0], labels[:, :, -1] = -100, -100, -100, -100
    return pixels, labels


def loss(model: nn.Module, batch: Any) -> Tensor:
    inputs, labels = batch
    return cross_entropy(model(inputs), labels)


def build(small: bool = False) -> Example:
    torch.manual_seed(0)
    count, side, classes, width = (4, 8, 3, 2) if small else (32, 64, 4, 16)
    x, y = shapes(count, side, classes)
    size = count // 2 if small else 8
    batches = list(zip(x.split(size), y.split(size), strict=True))
    model = train(UNet(1, classes, width), loss, batches)
    return Example("U-Net", model, batches, loss)


def main(small: bool = False) -> Row:
    return report(build(small))


if __name__ == "__main__":
    run(main, __doc__)
