"""One pass, whatever the order: estimators within a few thousandths of the dense optimum.

A small version of benchmarks/onepass.py, on the hard streams of hard_streams.py. Everything by the
public API, and everything that it is held against by dense algebra.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import kfoc
from hard_streams import (
    Case,
    Data,
    batches,
    excess,
    factors,
    fishers,
    gradients,
    mean,
    mean_of,
    problem,
)
from onepass_worker import over_ranks

SAMPLES, FEW, SEEDS = 240, 160, (0, 1, 2)
MEAN, LARGEST = 0.005, 0.02  # of the excess, at most
ROUNDING = 1e-9

ROWS = [
    *itertools.product(
        ("MLP", "convolutions", "attention"),
        ("in order", "sorted"),
        ((10, False), (8, True)),
    ),
    *itertools.product(("MLP", "convolutions", "attention"), ("shuffled",), ((8, False),)),
    # Steps for single samples, and buffers that no number of batches fills exactly.
    ("MLP", "in order", (1, False)),
    ("MLP", "sorted", (1, True)),
    ("attention", "sorted", (3, False)),
    ("convolutions", "sorted", (3, True)),
]


def close(excesses: list[float]) -> None:
    assert mean(excesses) <= MEAN, excesses
    assert max(excesses) <= LARGEST, excesses


@pytest.mark.parametrize(("network", "order", "batch"), ROWS)
def test_one_product(network: str, order: str, batch: tuple[int, bool]) -> None:
    seeds = SEEDS if batch[0] == 10 else SEEDS[:2]
    close([e for s in seeds for e in Case(network, s, SAMPLES, order, *batch).excesses()])


@pytest.mark.parametrize("estimator", ["rank 2", "rank 3"])
@pytest.mark.parametrize("network", ["MLP", "convolutions", "attention"])
def test_sums_of_products(network: str, estimator: str) -> None:
    for order, batch in (("sorted", (10, False)), ("in order", (8, True))):
        case = Case(network, 0, FEW, order, *batch, estimator=estimator)
        assert max(case.excesses()) <= LARGEST


SHARED = [
    Case(network, seed, FEW, order, 10, buffered, estimator, shards)
    for network, seed, order, buffered, estimator, shards in (
        ("MLP", 0, "in order", False, "online", "uneven"),
        ("MLP", 0, "sorted", False, "rank 2", "sorted"),
        ("convolutions", 0, "sorted", False, "online", "even"),
        ("attention", 2, "sorted", False, "online", "uneven"),
        ("attention", 0, "sorted", True, "online", "sorted"),
        ("attention", 1, "sorted", True, "rank 3", "uneven"),
    )
]


@pytest.fixture(scope="module", params=[2, 4])
def shared(request: pytest.FixtureRequest) -> dict[Case, list[float]]:
    found = over_ranks(SHARED, request.param, limit=120)
    return dict(zip(SHARED, found, strict=True))


@pytest.mark.parametrize("case", SHARED, ids=lambda c: f"{c.network}, {c.estimator}, {c.shards}")
def test_over_ranks(shared: dict[Case, list[float]], case: Case) -> None:
    if case.rank == 1:
        close(shared[case])
    else:
        assert max(shared[case]) <= LARGEST


@pytest.mark.parametrize("decay", [0.7, 0.95])
@pytest.mark.parametrize("network", ["MLP", "convolutions", "attention"])
def test_decay(network: str, decay: float) -> None:
    """Against `sum_b d^(B - b) N_b F_b / sum_b d^(B - b) N_b`, the last batch a smaller one."""
    for seed, order in ((0, "in order"), (1, "sorted")):
        data = Case(network, seed, SAMPLES, order, 9, False).data()
        assert len(data[-1][0]) == 6
        model = problem(network, seed, SAMPLES).model
        options: dict[str, Any] = {"estimator": kfoc.KFOC(decay=decay), "fisher": "empirical"}
        found = kfoc.fit(model, data, **options)
        ages = range(len(data) - 1, -1, -1)
        weights = torch.cat(
            [torch.full((len(x),), decay**age) for age, (x, _) in zip(ages, data, strict=True)]
        )
        rows = gradients(model, *(torch.cat(part) for part in zip(*data, strict=True)))
        for layer, part in rows.items():
            exact = mean_of(part, weights / weights.sum())
            assert excess(exact, *factors(found[layer])) <= LARGEST, (seed, order, layer)


def loud(at: int) -> tuple[nn.Module, Data]:
    """30 batches; the labels of one, at this place, are wrong, and so it has most of F."""
    trained = problem("MLP", 0, SAMPLES)
    targets = trained.targets.clone()
    targets[8 * at : 8 * at + 8] += 1
    return trained.model, batches(trained.inputs, targets % 5, 8)


@pytest.mark.parametrize("estimator", ["online", "buffered", "running", "rank 2", "decay"])
def test_every_batch_counts_and_counts_once(estimator: str) -> None:
    """What is left out, or taken in twice, can be an average batch that no mean would show."""
    kinds = {
        "online": kfoc.KFOC(buffer=0),
        "buffered": kfoc.KFOC(buffer=8 * 32 * 6),
        "running": kfoc.KFOC("running"),
        "rank 2": kfoc.KFOC(rank=2, buffer=8 * 32 * 6),
        "decay": kfoc.KFOC(decay=1.0),
    }
    for at in (0, 5, 6, 17, 29):
        model, data = loud(at)
        rows = gradients(model, *(torch.cat(part) for part in zip(*data, strict=True)))
        found = kfoc.fit(model, data, estimator=kinds[estimator], fisher="empirical")
        assert found.num_samples == SAMPLES
        for layer, part in rows.items():
            exact = mean_of(part)
            of_one = mean_of(part[8 * at : 8 * at + 8]).fisher * 8 / SAMPLES
            assert of_one.norm() >= 0.4 * exact.fisher.norm()  # what a mistake with it costs
            lefts, rights = factors(found[layer])
            assert excess(exact, lefts, rights, len(lefts)) <= LARGEST, (at, layer)


ESTIMATORS = {
    "online": kfoc.KFOC(),
    "without a buffer": kfoc.KFOC(buffer=0),
    "rank 2": kfoc.KFOC(rank=2),
    "decay": kfoc.KFOC(decay=0.9),
    "running": kfoc.KFOC("running"),
}


class CutError(Exception):
    """What ends a fit half way."""


@pytest.mark.parametrize("network", ["MLP", "attention"])
@pytest.mark.parametrize("name", ESTIMATORS)
def test_goes_on_to_the_same_bits(name: str, network: str, tmp_path: Path) -> None:
    case = Case(network, 0, SAMPLES, "sorted", 10, True)
    model, data = case.problem.model, case.data()
    estimator = ESTIMATORS[name]
    estimator = replace(estimator, buffer=min(estimator.buffer, case.buffer))
    options: dict[str, Any] = {"estimator": estimator, "fisher": "empirical"}
    expected = kfoc.fit(model, data, **options)
    for cut in (4, 13, 24):

        def cut_off(cut: int = cut) -> Iterator[tuple[Tensor, Tensor]]:
            yield from data[:cut]
            raise CutError

        folder, taken = tmp_path / str(cut), []
        # After the first batch, and after the last one that is whole: a fit reads one ahead.
        saved = kfoc.Checkpoint(folder, seconds=None, batches=cut - 2)
        with pytest.raises(CutError):
            kfoc.fit(model, cut_off(), checkpoint=saved, **options)
        found = kfoc.fit(
            model, data, checkpoint=saved, resume=True, progress=taken.append, **options
        )
        assert taken[0].batch == cut  # it did go on, and not begin anew
        for layer in expected:
            pairs = zip(factors(expected[layer]), factors(found[layer]), strict=True)
            assert all(torch.equal(*pair) for pair in pairs), (cut, layer)


@pytest.mark.parametrize(
    "estimator",
    [
        kfoc.KFOC(rtol=1e-12),
        kfoc.KFOC(rtol=1e-12, buffer=0),
        kfoc.KFOC("running", rtol=1e-12),
        kfoc.KFOC(rtol=1e-12, decay=0.5),
        kfoc.KFOC(rank=2, rtol=1e-12, buffer=0),
        kfoc.KFOC(rank=3, rtol=1e-12),
    ],
    ids=str,
)
@pytest.mark.parametrize("network", ["MLP", "attention"])
def test_one_batch_gets_its_optimum(network: str, estimator: kfoc.KFOC) -> None:
    each = problem(network, 0, SAMPLES)
    data = [(each.inputs, each.targets)]
    found = kfoc.fit(each.model, data, estimator=estimator, fisher="empirical")
    for layer, exact in fishers(network, 0, SAMPLES).items():
        assert excess(exact, *factors(found[layer]), estimator.rank) < ROUNDING


def test_all_of_a_buffer_is_one_batch() -> None:
    case = Case("MLP", 0, SAMPLES, "sorted", 3, False)
    estimator = kfoc.KFOC(rtol=1e-12, buffer=SAMPLES * 40)
    found = kfoc.fit(case.problem.model, case.data(), estimator=estimator, fisher="empirical")
    excesses = case.judged({layer: factors(found[layer]) for layer in found})
    assert max(excesses) < ROUNDING


@pytest.mark.parametrize(("rank", "summed"), [(1, {"out"}), (2, {"out", "head"})])
def test_sums_of_small_layers_are_exact(rank: int, summed: set[str]) -> None:
    """Where F has no more numbers than the buffer, which is too small for the samples.

    For a single product, of layers of several positions.
    """
    case = Case("attention", 0, SAMPLES, "sorted", 8, False, f"rank {rank}")
    estimator = kfoc.KFOC(rank=rank, rtol=0, buffer=(10 * 11) ** 2)
    assert estimator.buffer < SAMPLES * 6 * (10 + 11)
    found = kfoc.fit(case.problem.model, case.data(), estimator=estimator, fisher="empirical")
    excesses = dict(
        zip(found, case.judged({layer: factors(found[layer]) for layer in found}), strict=True)
    )
    assert {layer for layer, size in excesses.items() if size < ROUNDING} >= summed
