"""Part d: training by natural gradients, on networks with and without shared weights.

Every method tries as many settings, at the same seeds: AdamW learning rates, the others pairs of a
damping and a `kl_clip`, searched for until the best is not at an edge (search.py). "pi" is factored
damping, NaturalGradient's default, and "exact" is not factored. Eigen-corrected curvatures take two
passes over their data, so they cannot follow a stream of batches. "At ..." are curvatures in the
size of another, layer by layer: what they change is scale, what they keep is shape.
"""

from __future__ import annotations

import functools
import itertools
import math
import statistics
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

import kfoc
from kfoc.reproduce.results import Row, Unit
from networks import NETWORKS, Network, sample_losses
from rescaled import Rescaled
from search import Axis, Point, best, inside, search
from subjects import Data

SIZES, BATCH, STEPS, EVERY = (1024, 256, 500), 128, 100, 5
SEARCH, MORE, COUNT, MOST = (0, 1, 2), (3, 4), 14, 24
RATE = (Axis("lr", 1e-2, 10**0.25),)
PAIR = (Axis("damping", 1e-2, 10.0), Axis("kl_clip", 3e-4, 10**0.5))
SCORES = ("training", "held out")
# Name and kind of damping -> its estimator; None: AdamW.
METHODS: dict[tuple[str, str], kfoc.Estimator | None] = {
    ("AdamW", ""): None,
    ("K-FAC", "pi"): kfoc.KFAC(),
    ("K-FOC", "pi"): kfoc.KFOC(),
    ("K-FAC", "exact"): kfoc.KFAC(),
    ("K-FOC", "exact"): kfoc.KFOC(),
}
# Why one is ahead of the other: measured on some networks.
REASONS: dict[tuple[str, str], kfoc.Estimator | None] = {
    ("exact blocks", "exact"): kfoc.BlockDiagonal(),
    ("K-FOC at F's trace", "exact"): Rescaled(kfoc.KFOC(), kfoc.Diagonal()),
    ("K-FAC at K-FOC's norm", "exact"): Rescaled(kfoc.KFAC(), kfoc.KFOC(), "norm"),
}
EXPLAINED = ("CNN", "encoder")
ALL = METHODS | REASONS


def settings(quick: bool) -> dict[str, Any]:
    return {
        "train, held out, test": SIZES,
        "steps": 10 if quick else STEPS,
        "batch": BATCH,
        "settings tried": [2, 2] if quick else [COUNT, MOST],
        "seeds of the search": [0] if quick else list(SEARCH),
        "more seeds of the best": [] if quick else list(MORE),
        "axes": {axis.name: [axis.start, axis.step] for axis in (*RATE, *PAIR)},
        "loss every": EVERY,
    }


def units(quick: bool) -> Iterator[Unit]:
    for names, methods in ((tuple(NETWORKS), METHODS), (EXPLAINED, REASONS)):
        for name, (method, damped) in itertools.product(("tokens",) if quick else names, methods):
            unit = {"network": name, "method": method, "damped": damped}
            yield unit, functools.partial(searched, NETWORKS[name], (method, damped), quick)


def searched(network: Network, method: tuple[str, str], quick: bool) -> list[Row]:
    """A row for each setting and seed.

    "Best by" names the scores that the setting is the best by, over the seeds of the search, with
    the mean of the logarithm of the loss. "Inside" says that all its neighbours have been tried.
    """
    chosen, axes = settings(quick), RATE if ALL[method] is None else PAIR
    rows: dict[Point, list[Row]] = {}

    def run(point: Point, seed: int) -> Row:
        values = {axis.name: axis.at(k) for axis, k in zip(axes, point, strict=True)}
        row: Row = {"lr": None, "damping": None, "kl_clip": None} | values | {"seed": seed}
        return row | trained(network, method, values, seed, chosen["steps"])

    def measure(point: Point) -> tuple[float, ...]:
        rows[point] = [run(point, seed) for seed in chosen["seeds of the search"]]
        logs = ([math.log(row[score]) for row in rows[point]] for score in SCORES)
        return tuple(map(statistics.fmean, logs))

    tried = search(measure, len(axes), *chosen["settings tried"])
    chosen_points = best(tried)
    for point in dict.fromkeys(chosen_points):
        rows[point] += [run(point, seed) for seed in chosen["more seeds of the best"]]
    for point, found in rows.items():
        by = [score for score, where in zip(SCORES, chosen_points, strict=True) if where == point]
        for row in found:
            row |= {"best by": by, "inside": inside(point, tried)}
            row["losses"] = row["losses"] if by else None
    return [row for found in rows.values() for row in found]


@functools.cache
def _splits(network: Network, seed: int) -> list[Data]:
    return network.splits(SIZES, seed)


def trained(
    network: Network, method: tuple[str, str], values: dict[str, float], seed: int, steps: int
) -> Row:
    """One run; data, batches and starting point depend on the seed alone."""
    train, held_out, test = _splits(network, seed)
    model, estimator = network.model(seed), ALL[method]
    optimizer: torch.optim.Optimizer
    if estimator is None:
        optimizer = torch.optim.AdamW(model.parameters(), values["lr"], weight_decay=0.0)
    else:
        optimizer = kfoc.NaturalGradient(model, estimator=estimator, method=method[1], **values)
    generator = torch.Generator().manual_seed(seed)
    curve, order = [], []
    start = time.process_time()
    for _ in range(steps):
        order = order or list(torch.randperm(len(train[0]), generator=generator).split(BATCH))
        chosen = order.pop()
        if isinstance(optimizer, kfoc.NaturalGradient):
            optimizer.observe(train[0][chosen])
        optimizer.zero_grad()
        loss = sample_losses(model, (train[0][chosen], train[1][chosen])).mean()
        loss.backward()
        optimizer.step()
        curve.append(loss.item() / train[1][0].numel())
        if not curve[-1] < WORST:
            break
    seconds = time.process_time() - start
    curve += [WORST] * (steps - len(curve))
    windows = [curve[k : k + EVERY] for k in range(0, steps, EVERY)]
    scores = {"training": train, "held out": held_out, "test": test}
    ends = {name: final(model, data) for name, data in scores.items()}
    return {**ends, "seconds": seconds, "losses": [bounded(statistics.fmean(w)) for w in windows]}


# Of losses: a run that diverged is bad enough, and JSON has no infinity.
WORST = 100.0


def bounded(loss: float) -> float:
    return loss if loss < WORST else WORST


def final(model: nn.Module, data: Data) -> float:
    """The mean loss of a target, in evaluation mode."""
    model.eval()
    with torch.no_grad():
        found = sample_losses(model, data).mean().item() / data[1][0].numel()
    return max(bounded(found), 1e-12)
