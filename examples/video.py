"""A convolutional network over the frames of videos, folded into the batch, and a GRU over time."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from common import Example, Row, images, report, run, train


class Video(nn.Module):
    """(N, frames, channels, side, side) to logits."""

    def __init__(self, channels: int, width: int, hidden: int, classes: int) -> None:
        super().__init__()
        self.frames = nn.Sequential(
            nn.Conv2d(channels, width, 3, stride=2, padding=1),
            nn.GroupNorm(2, width),
            nn.ReLU(),
            nn.Conv2d(width, 2 * width, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
        )
        self.time = nn.GRU(2 * width, hidden, batch_first=True)
        self.head = nn.Linear(hidden, classes)

    def forward(self, videos: Tensor) -> Tensor:
        features = self.frames(videos.flatten(0, 1)).unflatten(0, videos.shape[:2])
        return self.head(self.time(features)[0][:, -1])


def loss(model: nn.Module, batch: Any) -> Tensor:
    videos, labels = batch
    return cross_entropy(model(videos), labels)


def build(small: bool = False) -> Example:
    torch.manual_seed(0)
    count, frames, side, classes = (6, 3, 6, 3) if small else (128, 8, 32, 10)
    channels = 1 if small else 3
    pixels, labels = images(count * frames, channels, side, classes)
    videos = pixels.unflatten(0, (count, frames))
    size = count // 2 if small else 32
    data = list(zip(videos.split(size), labels[::frames].split(size), strict=True))
    model = train(Video(channels, 4 if small else 32, 4 if small else 64, classes), loss, data)
    return Example("CNN + GRU", model, data, loss)


def main(small: bool = False) -> Row:
    return report(build(small))


if __name__ == "__main__":
    run(main, __doc__)
