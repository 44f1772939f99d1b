"""Part f: predicted influence against leaving samples out, with examples/influence.py.

The network is trained to the end, so that what training again brings is well defined. A damping of
the weight decay is the one that theory asks for; ten times it is a common remedy.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

import kfoc
from borrowed import borrowed

SEEDS, LEFT_OUT, QUERIES, TRAIN = (0, 1, 2), 40, 20, 600
DAMPINGS = (1.0, 10.0)  # times the weight decay


def settings(quick: bool) -> dict[str, Any]:
    return {
        "training samples": 60 if quick else TRAIN,
        "left out": 2 if quick else LEFT_OUT,
        "queries": QUERIES,
        "seeds": [0] if quick else list(SEEDS),
        "weight decay": borrowed("examples/influence.py").DECAY,
        "dampings, by the weight decay": DAMPINGS,
    }


def rows(quick: bool) -> Iterator[dict[str, Any]]:
    """By seed, method and damping.

    "correlation" is between predicted changes of loss and those that training again brings,
    "scale" the ratio of their standard deviations, "found" the share of mislabelled samples among
    the ten most harmful.
    """
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)  # changes by one sample are small
    try:
        for seed in settings(quick)["seeds"]:
            yield from of_seed(seed, settings(quick))
    finally:
        torch.set_default_dtype(before)


def of_seed(seed: int, chosen: dict[str, Any]) -> Iterator[dict[str, Any]]:
    example, count = borrowed("examples/influence.py"), chosen["training samples"]
    images, truth = example.digits(count + 400)
    inputs, (labels, wrong) = images[:count], example.mislabelled(truth[:count], 0.1)
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(64, 12), nn.Tanh(), nn.Linear(12, 10))
    example.train(model, inputs, labels, torch.ones(count), 1000)
    with torch.no_grad():
        losses = nn.functional.cross_entropy(model(images[count:]), truth[count:], reduction="none")
    worst = count + losses.argsort(descending=True)[: chosen["queries"]]
    query = images[worst], truth[worst]
    left_out = torch.arange(0, count, count // chosen["left out"])
    actual = example.changes_by_retraining(model, inputs, labels, query, left_out)
    data = list(zip(inputs.split(100), labels.split(100), strict=True))
    for method, estimator in example.ESTIMATORS.items():
        curvature = kfoc.fit(model, data, estimator=estimator, fisher="exact")
        for factor in chosen["dampings, by the weight decay"]:
            damping = factor * chosen["weight decay"]
            found = kfoc.influence(model, curvature, data, query, damping=damping, top=None)
            hits = wrong[found.harmful.indices[:, : example.TOP]].double().mean().item()
            row = {"seed": seed, "method": method, "damping": factor, "found": hits}
            assert found.scores is not None
            yield row | agreement(-found.scores[:, left_out] / count, actual)


def agreement(predicted: Tensor, actual: Tensor) -> dict[str, float]:
    pair = torch.stack([predicted.flatten(), actual.flatten()])
    scale = predicted.std() / actual.std()
    return {"correlation": torch.corrcoef(pair)[0, 1].item(), "scale": scale.item()}
