"""Small models and data that several tests share."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import kfoc

Data = list[tuple[Tensor, Tensor]]
# An estimator of every kind, with its defaults; for tests that cross them with something else.
ESTIMATORS: dict[str, kfoc.Estimator] = {
    "kfoc": kfoc.KFOC(),
    "running": kfoc.KFOC("running"),
    "approx": kfoc.KFOC("approx"),
    "exact": kfoc.KFOC("exact", passes=2),
    "rank": kfoc.KFOC(rank=2),
    "kfac": kfoc.KFAC(),
    "diagonal": kfoc.Diagonal(),
    "dense": kfoc.BlockDiagonal(),
}

# For tests of what holds after any number of passes, and that take few of them.
FEW_PASSES = pytest.mark.filterwarnings("ignore:.* did not converge in:RuntimeWarning")


class Dead(nn.Module):
    """Two linear layers, of which one is called and has no part in the outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.dead = nn.Linear(4, 2), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        self.dead(x)
        return self.used(x)


def convolutional(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    """3 classes from (N, 2, 8, 8): a convolution and two linear layers."""
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, stride=2, padding=1),
        nn.ReLU(inplace=True),
        nn.Flatten(),
        nn.Linear(64, 6),
        nn.Tanh(),
        nn.Linear(6, 3),
    ).to(dtype)


def images(count: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    return torch.randn(count, 2, 8, 8, dtype=dtype), torch.randint(3, (count,))


def batches(inputs: Tensor, targets: Tensor, size: int) -> Data:
    return list(zip(inputs.split(size), targets.split(size), strict=True))


def trained(count: int = 600, noise: float = 0.8) -> tuple[nn.Sequential, Tensor, Tensor]:
    """A classifier fitted to blobs, so that its gradients are heavy-tailed as in practice."""
    labels = torch.randint(4, (count,))
    inputs = torch.randn(4, 12)[labels] + noise * torch.randn(count, 12)
    model = nn.Sequential(
        nn.Linear(12, 20), nn.ReLU(), nn.Linear(20, 16), nn.ReLU(), nn.Linear(16, 4)
    )
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(inputs), labels).backward()
        optimizer.step()
    model.zero_grad(set_to_none=True)
    return model, inputs, labels
