"""Part d: training loss by natural gradients, on a small MLP.

AdamW gets as many settings as each of the others: sixteen learning rates against four dampings
times four lengths of step. "pi" is factored damping, NaturalGradient's default, and "exact" is not
factored. Eigen-corrected curvatures take two passes over their data, so they cannot follow a stream
of batches.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import kfoc
from kfoc.reproduce.results import Row, Unit
from subjects import mlp, small_digits

TRAIN, BATCH, STEPS, EVERY, SEEDS = 1437, 128, 100, 5, (0, 1, 2)
RATES = tuple(10 ** (-3.75 + k / 6) for k in range(16))
DAMPINGS, CLIPS = (1e-4, 1e-3, 1e-2, 1e-1), (3e-5, 1e-4, 3e-4, 1e-3)
ESTIMATORS = {"K-FAC": kfoc.KFAC(), "K-FOC": kfoc.KFOC()}


def settings(quick: bool) -> dict[str, Any]:
    return {
        "steps": 10 if quick else STEPS,
        "batch": BATCH,
        "seeds": [0] if quick else list(SEEDS),
        "AdamW: learning rates": RATES[8:9] if quick else RATES,
        "dampings": DAMPINGS[2:3] if quick else DAMPINGS,
        "kl_clip": CLIPS[2:3] if quick else CLIPS,
        "damping by": ["pi", "exact"],
        "loss every": EVERY,
    }


def units(quick: bool) -> Iterator[Unit]:
    """By method, kind of damping, setting and seed."""
    chosen = settings(quick)
    for rate in chosen["AdamW: learning rates"]:
        for seed in chosen["seeds"]:
            unit = {"method": "AdamW", "damped": "", "setting": f"lr {rate:.2g}", "seed": seed}
            yield unit, functools.partial(trained, chosen["steps"], seed, None, rate)
    grid = list(itertools.product(chosen["dampings"], chosen["kl_clip"]))
    for damped, method in itertools.product(chosen["damping by"], ESTIMATORS):
        for (damping, clip), seed in itertools.product(grid, chosen["seeds"]):
            options = {"estimator": ESTIMATORS[method], "method": damped}
            options |= {"damping": damping, "kl_clip": clip, "seed": seed}
            setting = f"damping {damping:g}, kl_clip {clip:g}"
            unit = {"method": method, "damped": damped, "setting": setting, "seed": seed}
            yield unit, functools.partial(trained, chosen["steps"], seed, options)


def trained(steps: int, seed: int, options: dict[str, Any] | None, rate: float = 0.0) -> list[Row]:
    """The curve of the loss of all training data. None: AdamW.

    Batches and starting point depend on the seed alone.
    """
    inputs, labels = small_digits()
    train, test = inputs[:TRAIN], inputs[TRAIN:]
    targets, truth = labels[:TRAIN], labels[TRAIN:]
    torch.manual_seed(seed)
    model = mlp(64, 64, 64, 10)
    optimizer: torch.optim.Optimizer
    if options is None:
        optimizer = torch.optim.AdamW(model.parameters(), rate, weight_decay=0.0)
    else:
        optimizer = kfoc.NaturalGradient(model, **options)
    generator = torch.Generator().manual_seed(seed)
    curve, order = [], []
    for step in range(1, steps + 1):
        order = order or list(torch.randperm(len(train), generator=generator).split(BATCH))[:-1]
        chosen = order.pop()
        if isinstance(optimizer, kfoc.NaturalGradient):
            optimizer.observe(train[chosen])
        optimizer.zero_grad()
        cross_entropy(model(train[chosen]), targets[chosen]).backward()
        optimizer.step()
        if step % EVERY == 0:
            curve.append(loss(model, train, targets))
    row = {"damping": options and options["damping"], "losses": curve, "final": curve[-1]}
    return [row | {"test": loss(model, test, truth)}]


def loss(model: nn.Module, inputs: Tensor, labels: Tensor) -> float:
    """At most 100: a run that diverged is bad enough, and JSON has no infinity."""
    with torch.no_grad():
        found = cross_entropy(model(inputs), labels).item()
    return found if found < 100 else 100.0
