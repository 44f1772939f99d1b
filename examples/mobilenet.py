"""Depthwise-separable convolutions as in MobileNet: one Kronecker product a channel."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from common import Example, Row, images, report, run, train


def normalised(convolution: nn.Conv2d) -> list[nn.Module]:
    return [convolution, nn.BatchNorm2d(convolution.out_channels), nn.ReLU6(inplace=True)]


def separable(ins: int, outs: int, stride: int) -> list[nn.Module]:
    depthwise = nn.Conv2d(ins, ins, 3, stride, padding=1, groups=ins, bias=False)
    return normalised(depthwise) + normalised(nn.Conv2d(ins, outs, 1, bias=False))


def mobilenet(channels: int, widths: list[int], classes: int) -> nn.Sequential:
    parts = normalised(nn.Conv2d(channels, widths[0], 3, stride=2, padding=1, bias=False))
    for ins, outs in pairwise(widths):
        parts += separable(ins, outs, stride=1 if ins == outs else 2)
    pool: list[nn.Module] = [nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*parts, *pool, nn.Linear(widths[-1], classes))


def loss(model: nn.Module, batch: Any) -> Tensor:
    inputs, labels = batch
    return cross_entropy(model(inputs), labels)


def build(small: bool = False) -> Example:
    torch.manual_seed(0)
    count, side, classes = (8, 8, 3) if small else (64, 64, 10)
    widths = [3, 4, 4] if small else [16, 32, 32, 64, 64, 128]
    x, y = images(count, 2 if small else 3, side, classes)
    size = count // 2 if small else 16
    batches = list(zip(x.split(size), y.split(size), strict=True))
    model = mobilenet(x.shape[1], widths, classes)
    train(model, loss, batches)
    return Example("MobileNet", model, batches, loss)


def main(small: bool = False) -> Row:
    return report(build(small))


if __name__ == "__main__":
    run(main, __doc__)
