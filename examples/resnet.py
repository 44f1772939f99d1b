"""ResNet (transformers): convolutions and BatchNorm, which has to be in evaluation mode."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import ResNetConfig, ResNetForImageClassification

from common import Example, Row, images, report, run, train


def loss(model: nn.Module, batch: Any) -> Tensor:
    inputs, labels = batch
    return cross_entropy(model(inputs).logits, labels)


def build(small: bool = False) -> Example:
    torch.manual_seed(0)
    count, side, classes = (8, 16, 3) if small else (64, 64, 10)
    config = ResNetConfig(
        num_channels=2 if small else 3,
        embedding_size=3 if small else 32,
        hidden_sizes=[3, 4] if small else [32, 64, 128, 256],
        depths=[1, 1] if small else [2, 2, 2, 2],
        layer_type="basic",
        num_labels=classes,
    )
    x, y = images(count, config.num_channels, side, classes)
    size = count // 2 if small else 16
    batches = list(zip(x.split(size), y.split(size), strict=True))
    # `train` ends in evaluation mode: by the statistics of a batch, samples are not independent.
    model = train(ResNetForImageClassification(config), loss, batches, rate=3e-3 if small else 3e-4)
    return Example("ResNet", model, batches, loss)


def main(small: bool = False) -> Row:
    return report(build(small))


if __name__ == "__main__":
    run(main, __doc__)
