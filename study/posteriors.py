"""Part c: Laplace posteriors by curvature, with examples/laplace.py on fewer digits.

The prior precision is that of the largest marginal likelihood, and that of the lowest loss on
held-out digits. "CNN" is small enough for the exact blocks.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch

from borrowed import borrowed
from kfoc.reproduce.results import Row, Unit

SIZES, EPOCHS, SEEDS = (1500, 250, 1000), 60, (0, 1, 2)


def settings(quick: bool) -> dict[str, Any]:
    return {
        "train, held out, test": (60, 8, 8) if quick else SIZES,
        "epochs": 2 if quick else EPOCHS,
        "seeds": [0] if quick else list(SEEDS),
        "priors tried on held-out digits": borrowed("examples/laplace.py").PRIORS,
    }


def units(quick: bool) -> Iterator[Unit]:
    networks = list(borrowed("examples/laplace.py").NETWORKS)
    for network in networks[:1] if quick else networks:
        for seed in settings(quick)["seeds"]:
            unit = {"network": network, "seed": seed}
            yield unit, functools.partial(of_network, network, seed, settings(quick))


def of_network(network: str, seed: int, chosen: dict[str, Any]) -> Iterator[Row]:
    """By method: log loss, calibration error and prior precision."""
    example = borrowed("examples/laplace.py")
    (build, estimators), sizes = example.NETWORKS[network], chosen["train, held out, test"]
    images, labels = example.digits()
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    parts = order[: sum(sizes)].split(sizes)
    splits = [(images[part], labels[part]) for part in parts]
    outside = splits[-1][0][:20]  # scores of what is out of distribution are not asked for
    found = example.compare(build, estimators, splits, outside, chosen["epochs"], seed)
    for method, scores in found.items():
        yield {"method": "trained network" if method == "MAP" else method} | kept(scores)


def kept(scores: dict[str, float]) -> dict[str, float]:
    """Without what depends on the images out of distribution."""
    return {name: score for name, score in scores.items() if "AUROC" not in name}
