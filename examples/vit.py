"""ViT (transformers): patches by a convolution, a class token, positions that are learnt."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import ViTConfig, ViTForImageClassification

from common import Example, Row, images, report, run, train


def loss(model: nn.Module, batch: Any) -> Tensor:
    return cross_entropy(model(pixel_values=batch["pixel_values"]).logits, batch["labels"])


def build(small: bool = False) -> Example:
    torch.manual_seed(0)
    count, side, classes = (6, 4, 3) if small else (64, 64, 10)
    width = 6 if small else 192
    config = ViTConfig(
        image_size=side,
        patch_size=2 if small else 8,
        num_channels=2 if small else 3,
        hidden_size=width,
        num_hidden_layers=1 if small else 4,
        num_attention_heads=2 if small else 3,
        intermediate_size=2 * width,
        num_labels=classes,
    )
    x, y = images(count, config.num_channels, side, classes)
    size = count // 2 if small else 16
    batches = [
        {"pixel_values": pixels, "labels": labels}
        for pixels, labels in zip(x.split(size), y.split(size), strict=True)
    ]
    model = train(ViTForImageClassification(config), loss, batches, rate=3e-3 if small else 3e-4)
    return Example("ViT", model, batches, loss)


def main(small: bool = False) -> Row:
    return report(build(small))


if __name__ == "__main__":
    run(main, __doc__)
