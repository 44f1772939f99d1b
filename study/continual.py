"""Part e: five tasks one after another, on networks with and without shared weights.

Each task is to tell two of scikit-learn's digits apart, by one pair of outputs for all tasks; one
quadratic for each task. Every method tries the same strengths of the penalty.
"""

from __future__ import annotations

import functools
import itertools
import statistics
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy

import kfoc
from kfoc.reproduce.results import Row, Unit
from networks import NETWORKS, SEEDS, Network, accuracy, batches
from posteriors import METHODS as ESTIMATORS
from subjects import Data, small_digits

NAMES, EPOCHS, BATCH, RATE = ("MLP", "CNN", "tokens"), 10, 40, 1e-2
SIZES = (200, 50, 90)  # of a task: to train, validate and test
# Times 1 / (samples of a task); no penalty is the strength 0.
STRENGTHS = (0.593, 1.78, 5.33, 16.0, 48.0, 144.0)
METHODS: dict[str, kfoc.Estimator | None] = {"no penalty": None} | ESTIMATORS
Task = tuple[Data, Data, Data]


def settings(quick: bool) -> dict[str, Any]:
    return {
        "train, validation, test of a task": list(SIZES),
        "epochs": 2 if quick else EPOCHS,
        "seeds": [0] if quick else list(SEEDS),
        "strengths": STRENGTHS[2:4] if quick else STRENGTHS,
    }


def units(quick: bool) -> Iterator[Unit]:
    chosen = settings(quick)
    for name, method in itertools.product(NAMES[:1] if quick else NAMES, METHODS):
        for strength in (0.0,) if METHODS[method] is None else chosen["strengths"]:
            unit = {"network": name, "method": method, "strength": strength}
            yield unit, functools.partial(of_seeds, NETWORKS[name], method, strength, quick)


def of_seeds(network: Network, method: str, strength: float, quick: bool) -> Iterator[Row]:
    for seed in settings(quick)["seeds"]:
        yield {"seed": seed} | run(network, method, strength, seed, quick)


@functools.cache
def tasks(seed: int) -> list[Task]:
    """The five tasks, with labels 0 and 1; which images are for what depends on the seed."""
    images, labels = small_digits()
    generator, found = torch.Generator().manual_seed(seed), []
    for first in range(0, 10, 2):
        pair = (labels // 2 == first // 2).nonzero().flatten()
        order = pair[torch.randperm(len(pair), generator=generator)][: sum(SIZES)]
        train, validation, test = [
            (images[part], labels[part] - first) for part in order.split(SIZES)
        ]
        found.append((train, validation, test))
    return found


def run(network: Network, method: str, strength: float, seed: int, quick: bool) -> Row:
    """Mean accuracies over the tasks after all of them, and how far they fell since each."""
    model, estimator = network.model(seed), METHODS[method]
    consolidation = kfoc.Consolidation(strength / SIZES[0], "each")
    generator, learnt = torch.Generator().manual_seed(seed), []
    for data, _, test in tasks(seed):
        learn(model, data, consolidation, settings(quick)["epochs"], generator)
        learnt.append(accuracy(model, test))
        if estimator is not None:
            parts = batches(data, 100)
            curvature = kfoc.fit(model, parts, estimator=estimator, fisher="exact")
            consolidation.add(model, curvature)
    final = [accuracy(model, test) for _, _, test in tasks(seed)]
    fallen = [then - now for then, now in zip(learnt[:-1], final[:-1], strict=True)]
    validation = statistics.fmean(accuracy(model, data) for _, data, _ in tasks(seed))
    forgotten = statistics.fmean(fallen)
    return {"validation": validation, "test": statistics.fmean(final), "forgetting": forgotten}


def learn(
    model: nn.Module,
    data: Data,
    consolidation: kfoc.Consolidation,
    epochs: int,
    generator: torch.Generator,
) -> None:
    optimizer = torch.optim.Adam(model.parameters(), RATE)
    for _ in range(epochs):
        for chosen in torch.randperm(len(data[0]), generator=generator).split(BATCH):
            loss = cross_entropy(model(data[0][chosen]), data[1][chosen])
            optimizer.zero_grad()
            (loss + consolidation.penalty(model)).backward()
            optimizer.step()
