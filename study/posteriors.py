"""Part c: Laplace posteriors by curvature, on networks with and without shared weights.

The prior precision is that of the largest marginal likelihood, and that of the lowest loss on
held-out data. Beside them are the network by itself, and with its logits divided by a temperature
that held-out data chose: what calibration costs without any curvature. Training sets are small, so
that there is something to be uncertain about.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import cross_entropy, nll_loss

import kfoc
from borrowed import borrowed
from estimators import ESTIMATORS
from kfoc.reproduce.results import Row, Unit
from networks import NETWORKS, SEEDS, Network, batches, train
from subjects import Data

SIZES, OF_GPT, STEPS, PRIOR = (200, 150, 600), (200, 8, 24), 800, 0.01
FEW = 3  # of seeds, on the GPT: its Jacobians are slow
# Of prior precisions: the held-out data choose among these, and the evidence is kept at them.
PRIORS = tuple(10 ** (k / 2) for k in range(-4, 10))
KEPT = PRIORS[2:9:2]
TEMPERATURES = tuple(2 ** (k / 8) for k in range(-16, 25))
METHODS = {name: each for name, each in ESTIMATORS.items() if "rank" not in name} | {
    "exact blocks": kfoc.BlockDiagonal()
}


def settings(quick: bool) -> dict[str, Any]:
    return {
        "train, held out, test": [60, 10, 10] if quick else list(SIZES),
        "of the GPT": [60, 10, 10] if quick else list(OF_GPT),
        "seeds of the GPT": FEW,
        "steps of Adam": 20 if quick else STEPS,
        "prior precision of training": PRIOR,
        "seeds": [0] if quick else list(SEEDS),
        "priors tried on held-out data": PRIORS,
        "evidence at priors": KEPT,
    }


def units(quick: bool) -> Iterator[Unit]:
    for seed in settings(quick)["seeds"]:
        names = [name for name in NETWORKS if name != "GPT" or seed < FEW]
        for name in names[:2] if quick else names:
            unit = {"network": name, "seed": seed}
            yield unit, functools.partial(of_network, NETWORKS[name], seed, quick)


def of_network(network: Network, seed: int, quick: bool) -> list[Row]:
    """By layers and method: evidence, log loss and calibration error."""
    with sdpa_kernel(SDPBackend.MATH):  # the others have no batching rule
        return list(measured(network, seed, quick))


def measured(network: Network, seed: int, quick: bool) -> Iterator[Row]:
    chosen = settings(quick)
    sizes = chosen["of the GPT" if network.name == "GPT" else "train, held out, test"]
    data, held_out, test = network.splits(tuple(sizes), seed)
    decay = chosen["prior precision of training"] / len(data[0])
    model = train(network.model(seed), data, chosen["steps of Adam"], seed, decay)
    with torch.no_grad():
        logits, wanted = model(test[0]), model(held_out[0])
    empty: Row = dict.fromkeys(("prior", "evidence", "evidences", "held-out prior"))
    alone = empty | {"layers": "none"}
    yield alone | {"method": "trained network"} | twice(scores(logits.softmax(-1), test[1]))
    losses = [loss(wanted / t, held_out[1]) for t in TEMPERATURES]
    best = TEMPERATURES[losses.index(min(losses))]
    scaled = scores((logits / best).softmax(-1), test[1])
    yield alone | {"method": "temperature scaling"} | twice(scaled)
    for layers, names in (("all", None), ("last", last_layer(model))):
        for method, estimator in METHODS.items():
            curvature = kfoc.fit(
                model, batches(data, 100), estimator=estimator, layers=names,
                fisher="mc" if network.name == "GPT" else "exact", seed=seed,
            )  # fmt: skip
            found = of_posterior(kfoc.Laplace(model, curvature), data, held_out, test)
            yield {"layers": layers, "method": method} | found


def last_layer(model: nn.Module) -> str:
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear)][-1]


def of_posterior(laplace: kfoc.Laplace, data: Data, held_out: Data, test: Data) -> Row:
    count = len(data[0])
    fit = laplace.data_fit(batches(data, 100))
    tuned = laplace.tuned(fit)
    prior, _ = laplace.validated([held_out], PRIORS).best
    validated = replace(laplace, prior_precision=prior)
    at = [laplace.log_marginal_likelihood(fit, prior_precision=p).item() / count for p in KEPT]
    its = scores(validated.probabilities(test[0]), test[1])
    return {
        "prior": tuned.prior_precision,
        "evidence": tuned.log_marginal_likelihood(fit).item() / count,
        "evidences": at,
        "held-out prior": prior,
        **scores(tuned.probabilities(test[0]), test[1]),
        **{f"its {name}": value for name, value in its.items()},
    }


def loss(logits: Tensor, targets: Tensor) -> float:
    return cross_entropy(logits.flatten(0, -2), targets.flatten()).item()


def scores(probabilities: Tensor, targets: Tensor) -> dict[str, float]:
    flat, labels = probabilities.flatten(0, -2), targets.flatten()
    return {
        "accuracy": (flat.argmax(1) == labels).double().mean().item(),
        "NLL": nll_loss(flat.clamp_min(1e-30).log(), labels).item(),
        "ECE": borrowed("examples/laplace.py").calibration_error(flat, labels),
    }


def twice(found: dict[str, float]) -> dict[str, float]:
    """Of what has no prior, in the columns of both priors."""
    return found | {f"its {name}": value for name, value in found.items()}
