"""Part g: what a network still does when most of its weights are gone, by what chose them.

Weights of all layers go at once, those first whose loss is expected to cost least; biases, and the
scales of normalisations, stay. Nothing is trained again. With d the damping:

- "magnitude": `w^2`;
- "OBD", optimal brain damage: `(F_ii + d) w^2`, the rest stays as it is;
- "OBS", optimal brain surgeon: `w^2 / [(F + d)^-1]_ii`, and the rest moves to the minimum of the
  quadratic model (of a diagonal it does not move).
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

import kfoc
from borrowed import borrowed
from estimators import ESTIMATORS
from kfoc.reproduce.results import Row, Unit
from networks import NETWORKS, SEEDS, Network, batches, sample_losses, train

SIZES, STEPS, DECAY = (800, 300, 600), 600, 1e-4
SPARSITIES, DAMPINGS = (0.5, 0.7, 0.9), (1e-6, 1e-5, 1e-4, 1e-3, 1e-2)
METHODS = {name: ESTIMATORS[name] for name in ("diagonal", "K-FAC", "K-FOC", "EKFAC", "EK-FOC")}
METHODS["exact blocks"] = kfoc.BlockDiagonal(max_size=5000)
Weights = dict[str, Tensor]


def settings(quick: bool) -> dict[str, Any]:
    return {
        "train, held out, test": (40, 20, 20) if quick else SIZES,
        "steps of Adam": 10 if quick else STEPS,
        "weight decay": DECAY,
        "seeds": [0] if quick else list(SEEDS),
        "Fisher": "exact, of the GPT by one draw",
        "sparsities": SPARSITIES[:1] if quick else SPARSITIES,
        "dampings": DAMPINGS[:1] if quick else DAMPINGS,
    }


def units(quick: bool) -> Iterator[Unit]:
    names = ("tokens", "ResNet") if quick else tuple(NETWORKS)
    for name, seed in itertools.product(names, settings(quick)["seeds"]):
        unit = {"network": name, "seed": seed}
        yield unit, functools.partial(of_network, NETWORKS[name], seed, settings(quick))


def of_network(network: Network, seed: int, chosen: dict[str, Any]) -> Iterator[Row]:
    """By method, order of the weights, damping and sparsity: losses and accuracy."""
    data, held_out, test = network.splits(chosen["train, held out, test"], seed)
    model = train(network.model(seed), data, chosen["steps of Adam"], seed, DECAY)
    weights = {name: p.detach() for name, p in model.named_parameters()}
    share = len(test[1].flatten()) / len(test[0])  # positions of a sample

    def scores(weights: Weights) -> Row:
        found = {}
        for name, part in (("held-out loss", held_out), ("test loss", test)):
            losses = sample_losses(functools.partial(_outputs, model, weights), part)
            found[name] = min(losses.mean().item() / share, 100.0)
        right = _outputs(model, weights, test[0]).argmax(-1) == test[1]
        return found | {"accuracy": right.double().mean().item()}

    yield {"method": "whole network", "order": "", "damping": None, "sparsity": 0.0} | scores(
        weights
    )
    for sparsity in chosen["sparsities"]:
        row = {"method": "magnitude", "order": "", "damping": None, "sparsity": sparsity}
        mask = kept({k: w.square() for k, w in weights.items()}, sparsity)
        yield row | scores({k: mask[k] * w for k, w in weights.items()})
    fisher = "mc" if network.name == "GPT" else "exact"  # 448 outputs a sample
    for method, estimator in METHODS.items():
        curvature = kfoc.fit(model, batches(data, 100), estimator=estimator, fisher=fisher)
        for damping in chosen["dampings"]:
            for order, sparsity, pruned in prunings(weights, curvature, damping, chosen):
                row = {"method": method, "order": order, "damping": damping, "sparsity": sparsity}
                yield row | scores(pruned)


def prunings(
    weights: Weights, curvature: kfoc.Curvature, damping: float, chosen: dict[str, Any]
) -> Iterator[tuple[str, float, Weights]]:
    """Order, sparsity, and what of the weights is left."""
    adjusted = borrowed("examples/pruning.py").adjusted
    diagonal = curvature.diagonal()
    variances = curvature.damped(damping).inverse_diagonal()
    damage = {k: (diagonal[k] + damping) * w.square() for k, w in weights.items()}
    surgeon = {k: w.square() / variances[k] for k, w in weights.items()}
    for sparsity in chosen["sparsities"]:
        mask = kept(damage, sparsity)
        yield "OBD", sparsity, {k: mask[k] * w for k, w in weights.items()}
        if any(not isinstance(block, kfoc.DiagonalBlock) for block in curvature.values()):
            yield "OBS", sparsity, adjusted(weights, kept(surgeon, sparsity), curvature, damping)


def kept(saliency: Mapping[str, Tensor], sparsity: float) -> Weights:
    """1 for what stays, 0 for the share of the matrices' entries with the smallest saliencies."""
    every = torch.cat([s.flatten() for s in saliency.values() if s.ndim > 1])
    bound = every.kthvalue(int(sparsity * len(every))).values
    return {k: (s > bound).to(s) if s.ndim > 1 else torch.ones_like(s) for k, s in saliency.items()}


def _outputs(model: nn.Module, weights: Weights, inputs: Tensor) -> Tensor:
    with torch.no_grad():
        return functional_call(model, weights, (inputs,))
