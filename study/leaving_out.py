"""Part f: predicted influence of training samples against what leaving them out brings.

Two targets, each the change of the queries' losses when one training sample is left out:

- "retraining": training again from the minimum that the network is at, where that is reproducible:
  full batches, L-BFGS, float64;
- "proximal": the proximal Bregman response (Bae et al. 2022): from wherever the network is, the
  minimum of `mean_n KL(p_n before | p_n) + decay / 2 |change|^2` less a tenth of the sample's
  part of the loss, times ten. That is what influence functions estimate in networks not trained to
  the end.

Predictions are by each curvature, and by a few products with the true Fisher, where it is the
preconditioner: for all queries "together", which share their search directions, or for each query
"alone". A damping of the weight decay is the one that theory asks for.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import kl_div, log_softmax

import kfoc
from estimators import ESTIMATORS
from kfoc.reproduce.results import Row, Unit
from networks import NETWORKS, SEEDS, Network, batches, minimise, sample_losses, train
from subjects import Data
from true_fisher import TrueFisher

TRAIN, QUERIES, LEFT_OUT, WRONG, DECAY = 150, 40, 30, 0.05, 1e-2
SEQUENCES = 75  # of 16 labels each
SHARE = 0.1  # of a sample's weight that a proximal response is to: more is not local everywhere
DAMPINGS, PRODUCTS = (1.0, 10.0, 0.1), (1, 2, 3, 5, 10)
STATIONARY = 1e-6  # the largest entry of a gradient at a minimum
MINIMISED = ("MLP", "CNN", "tokens", "encoder")  # the others are trained by Adam, as is usual
METHODS = {name: ESTIMATORS[name] for name in ("diagonal", "K-FAC", "K-FOC", "EKFAC", "EK-FOC")}
METHODS["exact blocks"] = kfoc.BlockDiagonal(max_size=5000)


def settings(quick: bool) -> dict[str, Any]:
    return {
        "training samples": 20 if quick else TRAIN,
        "training samples of the GPT": SEQUENCES,
        "left out": 3 if quick else LEFT_OUT,
        "queries": 4 if quick else QUERIES,
        "mislabelled": WRONG,
        "weight decay": DECAY,
        "seeds": [0] if quick else list(SEEDS),
        "steps: L-BFGS, at first and again; Adam": (20, 10, 20) if quick else (1000, 60, 400),
        "share of the weight, proximal": SHARE,
        "largest gradient at a minimum": STATIONARY,
        "dampings, by the weight decay": DAMPINGS,
        "products": PRODUCTS[:1] if quick else PRODUCTS,
    }


def units(quick: bool) -> Iterator[Unit]:
    chosen = settings(quick)
    for name in ("tokens", "ResNet") if quick else NETWORKS:  # the GPT, which takes longest, last
        for seed in chosen["seeds"]:
            unit = {"network": name, "seed": seed}
            yield unit, functools.partial(of_network, NETWORKS[name], seed, chosen)


def of_network(network: Network, seed: int, chosen: dict[str, Any]) -> list[Row]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)  # changes by one sample are small
    try:
        with sdpa_kernel(SDPBackend.MATH):  # the others have no batching rule
            return list(measured(network, seed, chosen))
    finally:
        torch.set_default_dtype(before)


def measured(network: Network, seed: int, chosen: dict[str, Any]) -> Iterator[Row]:
    """By target, method, damping, products and how the queries are solved for.

    "pearson" is the correlation of predicted and real changes over all pairs, "spearman" that of
    ranks, a query at a time; "scale" the ratio of the standard deviations; "found" the share of
    mislabelled samples among as many that are the most harmful to all queries together.
    """
    count = chosen["training samples" + " of the GPT" * (network.name == "GPT")]
    data, query = network.splits((count, chosen["queries"]), seed)
    data, wrong = mislabelled(data, chosen["mislabelled"], seed)
    first, again, steps = chosen["steps: L-BFGS, at first and again; Adam"]
    model = network.model(seed)
    if network.name in MINIMISED:
        parameters = list(model.parameters())
        minimise(
            parameters,
            lambda: (
                sample_losses(model, data).mean()
                + DECAY / 2 * sum(p.square().sum() for p in parameters)
            ),
            first,
            STATIONARY,
        )
        model.eval()
    else:
        train(model, data, steps, seed, DECAY)
    left_out = torch.arange(count)[:: count // chosen["left out"]][: chosen["left out"]]
    fisher = TrueFisher(model, data)
    actual = {"proximal": proximal(fisher, data, query, left_out, again)}
    if network.name in MINIMISED:
        actual["retraining"] = retrained(fisher, data, query, left_out, again)
    for row, scores in predicted(fisher, data, query, chosen):
        worst = scores.sum(0).argsort(descending=True)[: int(wrong.sum())]
        row |= {"found": wrong[worst].double().mean().item()}
        for target, changes in actual.items():
            yield {"target": target} | row | agreement(-scores[:, left_out] / count, changes)


def mislabelled(data: Data, share: float, seed: int) -> tuple[Data, Tensor]:
    """Some samples with wrong labels at all positions, and which those are."""
    inputs, targets = data
    generator = torch.Generator().manual_seed(seed)
    classes = int(targets.max()) + 1
    wrong = torch.zeros(len(targets), dtype=torch.bool)
    wrong[torch.randperm(len(targets), generator=generator)[: max(int(share * len(wrong)), 1)]] = 1
    shift = torch.randint(1, classes, targets.shape, generator=generator)
    there = wrong.view(-1, *[1] * (targets.ndim - 1))
    return (inputs, torch.where(there, (targets + shift) % classes, targets)), wrong


def retrained(fisher: TrueFisher, data: Data, query: Data, left_out: Tensor, steps: int) -> Tensor:
    """(queries, left out): the changes of loss by training again."""

    def objective(change: Tensor, n: int) -> Tensor:
        losses = sample_losses(fisher.model_at(change), data)
        penalty = DECAY / 2 * (fisher.start + change).square().sum()
        return (losses.sum() - losses[n]) / len(losses) + penalty

    return responses(fisher, objective, query, left_out, steps)


def proximal(fisher: TrueFisher, data: Data, query: Data, left_out: Tensor, steps: int) -> Tensor:
    """(queries, left out): the changes of loss by the proximal Bregman response, to first order."""
    with torch.no_grad():
        known = log_softmax(fisher.model(data[0]), -1)

    def objective(change: Tensor, n: int) -> Tensor:
        now = log_softmax(fisher.model_at(change)(data[0]), -1)
        moved = kl_div(now, known, reduction="sum", log_target=True)
        loss = -now[n].gather(-1, data[1][n, ..., None]).sum()
        return (moved - SHARE * loss) / len(known) + DECAY / 2 * change.square().sum()

    return responses(fisher, objective, query, left_out, steps) / SHARE


def responses(
    fisher: TrueFisher, objective: Callable[..., Tensor], query: Data, left_out: Tensor, steps: int
) -> Tensor:
    """The query's losses at the minimum of `objective(change, n)` less those before.

    L-BFGS in coordinates in which the damped Fisher is the identity, where it needs few steps.
    """
    root = torch.linalg.cholesky(fisher.damped(DECAY))

    def change(place: Tensor) -> Tensor:
        return torch.linalg.solve_triangular(root.mT, place[:, None], upper=True)[:, 0]

    with torch.no_grad():
        before, columns = sample_losses(fisher.model, query), []
    for n in left_out.tolist():
        place = torch.zeros(len(root), requires_grad=True)
        minimise([place], lambda n=n, place=place: objective(change(place), n), steps, STATIONARY)
        with torch.no_grad():
            columns.append(sample_losses(fisher.model_at(change(place)), query) - before)
    return torch.stack(columns, 1)


def predicted(
    fisher: TrueFisher, data: Data, query: Data, chosen: dict[str, Any]
) -> Iterator[tuple[Row, Tensor]]:
    """What a prediction is by, and its scores (queries, training samples)."""
    counts = chosen["products"]
    wanted, given = fisher.gradients(query), fisher.gradients(data)

    def case(method: str, damping: float, products: int = 0, queries: str = "together") -> Row:
        return {"method": method, "damping": damping, "products": products, "queries": queries}

    def solved(method: str, prepare: Callable[[Tensor], Tensor]) -> Iterator[tuple[Row, Tensor]]:
        alone = list(fisher.alone(wanted, DECAY, prepare, max(counts)))
        for k in counts:
            together = fisher.together(wanted, DECAY, prepare, k)
            yield case(method, 1.0, k), -together @ given.mT
            yield case(method, 1.0, k, "alone"), -alone[k - 1] @ given.mT

    for method, estimator in METHODS.items():
        curvature = kfoc.fit(fisher.model, batches(data, 50), estimator=estimator, fisher="exact")
        for factor in chosen["dampings, by the weight decay"]:
            found = kfoc.influence(
                fisher.model, curvature, batches(data, 50), query, damping=factor * DECAY, top=None
            )
            yield case(method, factor), found.scores
        yield from solved(method, functools.partial(fisher.divided, curvature.damped(DECAY)))
    for factor in chosen["dampings, by the weight decay"]:
        exact = torch.linalg.solve(fisher.damped(factor * DECAY), wanted.mT).mT
        yield case("exact solve", factor), -exact @ given.mT
    yield case("no curvature", 1.0), -wanted @ given.mT / DECAY
    yield from solved("no curvature", lambda rows: rows)


def agreement(predicted: Tensor, actual: Tensor) -> dict[str, float]:
    pairs = torch.stack([predicted.flatten(), actual.flatten()])
    ranks = torch.stack([predicted, actual]).argsort(dim=-1).argsort(dim=-1).double()
    by_query = [torch.corrcoef(pair)[0, 1] for pair in ranks.unbind(1)]
    return {
        "pearson": torch.corrcoef(pairs)[0, 1].item(),
        "spearman": torch.stack(by_query).mean().item(),
        "scale": (predicted.std() / actual.std()).item(),
    }
