"""Part c: Laplace posteriors by curvature, with examples/laplace.py on fewer digits.

The prior precision is that of the largest marginal likelihood, and that of the lowest loss on
held-out digits. "CNN" is small enough for the exact blocks.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from borrowed import borrowed

SIZES, EPOCHS, SEEDS = (1500, 250, 1000), 60, (0, 1, 2)


def settings(quick: bool) -> dict[str, Any]:
    return {
        "train, held out, test": (60, 8, 8) if quick else SIZES,
        "epochs": 2 if quick else EPOCHS,
        "seeds": [0] if quick else list(SEEDS),
        "priors tried on held-out digits": borrowed("examples/laplace.py").PRIORS,
    }


def rows(quick: bool) -> Iterator[dict[str, Any]]:
    """By network, seed and method: log loss, calibration error and prior precision."""
    example, chosen = borrowed("examples/laplace.py"), settings(quick)
    sizes = chosen["train, held out, test"]
    images, labels = example.digits()
    networks = list(example.NETWORKS.items())
    for network, (build, estimators) in networks[:1] if quick else networks:
        for seed in chosen["seeds"]:
            order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
            parts = order[: sum(sizes)].split(sizes)
            splits = [(images[part], labels[part]) for part in parts]
            outside = splits[-1][0][:20]  # scores of what is out of distribution are not asked for
            found = example.compare(build, estimators, splits, outside, chosen["epochs"], seed)
            for method, scores in found.items():
                method = "trained network" if method == "MAP" else method
                yield {"network": network, "seed": seed, "method": method} | kept(scores)


def kept(scores: dict[str, float]) -> dict[str, float]:
    """Without what depends on the images out of distribution."""
    return {name: score for name, score in scores.items() if "AUROC" not in name}
