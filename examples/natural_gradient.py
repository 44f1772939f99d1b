"""Natural gradients by K-FOC beside AdamW, on the 8 x 8 digits of scikit-learn.

python examples/natural_gradient.py
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import kfoc

BATCH, EPOCHS = 128, 6


def digits() -> tuple[Tensor, Tensor]:
    pixels, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    images = torch.from_numpy(pixels).float() / 16 - 0.3
    return images[order], torch.from_numpy(labels).long()[order]


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(64, 100), nn.ReLU(), nn.Linear(100, 100), nn.ReLU(), nn.Linear(100, 10)
    )


def losses(make: Callable[[nn.Module], torch.optim.Optimizer]) -> list[float]:
    """The mean training loss after each epoch."""
    images, labels = digits()
    model = network()
    optimizer = make(model)
    found = []
    for _ in range(EPOCHS):
        for x, y in zip(images.split(BATCH), labels.split(BATCH), strict=True):
            if isinstance(optimizer, kfoc.NaturalGradient):
                optimizer.observe(x)  # does something in every tenth step
            optimizer.zero_grad()
            cross_entropy(model(x), y).backward()
            optimizer.step()
        with torch.no_grad():
            found.append(cross_entropy(model(images), labels).item())
    return found


def main() -> None:
    methods: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
        "AdamW": lambda model: torch.optim.AdamW(model.parameters(), lr=3e-3),
        "K-FAC": lambda model: kfoc.NaturalGradient(model, kl_clip=1e-3, estimator=kfoc.KFAC()),
        "K-FOC": lambda model: kfoc.NaturalGradient(model, kl_clip=1e-3),
    }
    print("training loss after each epoch")
    for name, make in methods.items():
        print(f"{name:6}", "  ".join(f"{loss:.4f}" for loss in losses(make)))


if __name__ == "__main__":
    main()
