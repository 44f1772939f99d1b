"""Swin (transformers): windows folded into the batch, and a bias for every pair of places."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import SwinConfig, SwinForImageClassification

from common import Example, Row, images, report, run, train


def loss(model: nn.Module, batch: Any) -> Tensor:
    pixels, labels = batch
    return cross_entropy(model(pixels).logits, labels)


def build(small: bool = False) -> Example:
    torch.manual_seed(0)
    count, side, classes = (6, 8, 3) if small else (128, 32, 10)
    config = SwinConfig(
        image_size=side,
        patch_size=2,
        num_channels=1 if small else 3,
        embed_dim=4 if small else 48,
        depths=[1, 1] if small else [2, 2],
        num_heads=[1, 2] if small else [2, 4],
        window_size=2 if small else 4,
        mlp_ratio=2.0,
        hidden_dropout_prob=0.0,
        drop_path_rate=0.0,
        num_labels=classes,
    )
    pixels, labels = images(count, config.num_channels, side, classes)
    size = count // 2 if small else 32
    batches = list(zip(pixels.split(size), labels.split(size), strict=True))
    model = train(SwinForImageClassification(config), loss, batches)
    return Example("Swin", model, batches, loss)


def main(small: bool = False) -> Row:
    return report(build(small))


if __name__ == "__main__":
    run(main, __doc__)
