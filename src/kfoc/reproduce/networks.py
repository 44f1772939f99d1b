"""The paper's two networks, trained from scratch and the same for the same seed."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from kfoc.reproduce.data import Dataset

HIDDEN = 50


class Regression(nn.Module):
    """d -> 50 -> 1 with ReLU."""

    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.hidden = nn.Linear(inputs, HIDDEN)
        self.output = nn.Linear(HIDDEN, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(N, d) -> (N, 1)."""
        return self.output(self.hidden(x).relu())


class LeNet5(nn.Module):
    """LeNet-5 with ReLU and max-pooling."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 6, 5, padding=2)
        self.conv2 = nn.Conv2d(6, 16, 5)
        self.fc1 = nn.Linear(400, 120)
        self.fc2 = nn.Linear(120, 84)
        self.fc3 = nn.Linear(84, 10)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 1, 28, 28) -> (N, 10) logits."""
        x = nn.functional.max_pool2d(self.conv1(x).relu(), 2)
        x = nn.functional.max_pool2d(self.conv2(x).relu(), 2)
        x = self.fc1(x.flatten(1)).relu()
        return self.fc3(self.fc2(x).relu())


def half_mean_squared_error(outputs: Tensor, targets: Tensor) -> Tensor:
    """Half the mean of squared differences: minus the gaussian log-likelihood, up to a constant."""
    return 0.5 * (outputs - targets).square().mean()


def train(
    build: Callable[[], nn.Module],
    loss_function: Callable[[Tensor, Tensor], Tensor],
    data: Dataset,
    seed: int,
    epochs: int,
    batch_size: int,
    learning_rate: float,
) -> nn.Module:
    """Train `build()` by Adam; the result depends on the arguments alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = build().float()
    shuffles = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(network.parameters(), lr=learning_rate)
    for _ in range(epochs):
        for chosen in torch.randperm(len(data), generator=shuffles).split(batch_size):
            optimizer.zero_grad()
            loss_function(network(data.inputs[chosen]), data.targets[chosen]).backward()
            optimizer.step()
    return network.eval().requires_grad_(True)
