"""A model and its data for `kfoc compare examples/compare_factory.py:digits`."""

import torch
from torch import nn


def digits() -> tuple[nn.Module, list, dict]:
    """A small convolutional classifier of made-up images: (model, data, arguments of kfoc.fit)."""
    torch.manual_seed(0)
    labels = torch.randint(5, (1000,))
    images = torch.randn(5, 1, 12, 12)[labels] + 2.0 * torch.randn(1000, 1, 12, 12)
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(144, 32),
        nn.ReLU(),
        nn.Linear(32, 5),
    )
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(25):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()
    model.eval()
    data = list(zip(images.split(100), labels.split(100), strict=True))
    return model, data, {"likelihood": "categorical"}
