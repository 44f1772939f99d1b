"""One rank of tests/test_distributed.py: every check on all ranks of one gloo group, in order.

    python distributed_worker.py RANK WORLD DIRECTORY

Writes DIRECTORY/result-RANK.json: check -> "", "skipped: ...", or what went wrong.
"""

from __future__ import annotations

import copy
import itertools
import json
import math
import os
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import kfoc
import oracle
from head_and_tail import Recursion
from kfoc.distributed import Ranks, RanksError
from kfoc.estimators import head
from kfoc.files.folder import write
from models import Data, batches, convolutional, images, trained
from ranks import joined

LAYERS = ("0", "3", "5")
CHECKS: dict[str, Callable[[int, int], None]] = {}


def check(function: Callable[[int, int], None]) -> Callable[[int, int], None]:
    CHECKS[function.__name__] = function
    return function


def fitted(model: nn.Module, data: Any, **options: Any) -> kfoc.Curvature:
    return kfoc.fit(model, data, group=distributed.group.WORLD, **options)


def assert_same(found: kfoc.Curvature, expected: kfoc.Curvature, tolerance: float = 1e-8) -> None:
    assert list(found) == list(expected)
    assert found.num_samples == expected.num_samples
    for name in expected:
        a, b = found[name].to_dense(), expected[name].to_dense()
        torch.testing.assert_close(a, b, rtol=0, atol=tolerance * b.abs().max().item() + 1e-300)


def assert_on_all_ranks(curvature: kfoc.Curvature, world: int) -> None:
    """Every rank has the very same numbers."""
    for block in curvature.values():
        for tensor in block.tensors():
            found = [torch.empty_like(tensor) for _ in range(world)]
            distributed.all_gather(found, tensor.contiguous())
            assert all(torch.equal(tensor, other) for other in found)


def data_and_model() -> tuple[nn.Sequential, Tensor, Tensor, Data]:
    """45 samples in 9 batches of 5: no world size divides it."""
    model, (x, y) = convolutional(), images(45)
    return model, x, y, batches(x, y, 5)


@check
def exact_is_the_optimum_of_all_data(rank: int, world: int) -> None:
    model, x, _, data = data_and_model()
    for buffer in (0, 2**19):  # nothing or all data fits
        estimator = kfoc.KFOC("exact", rtol=0, passes=400, buffer=buffer)
        curvature = fitted(model, data[rank::world], fisher="exact", estimator=estimator)
        alone = kfoc.fit(model, data, fisher="exact", estimator=estimator)
        cotangents = oracle.categorical_exact(model(x).detach())
        for layer in LAYERS:
            block = curvature[layer]
            assert block.report.converged
            expected = oracle.fisher_block(model, layer, x, cotangents)
            best, _, _ = oracle.optimum(expected, *block.shape)
            scale = best.abs().max().item()
            torch.testing.assert_close(block.to_dense(), best, rtol=0, atol=1e-8 * scale)
        assert_same(curvature, alone)
        assert_on_all_ranks(curvature, world)


@check
def sums_are_those_of_one_process(rank: int, world: int) -> None:
    model, _, _, data = data_and_model()
    for estimator in (
        kfoc.KFAC(),
        kfoc.Diagonal(),
        kfoc.BlockDiagonal(),
        kfoc.EigenCorrected(kfoc.KFAC()),
        kfoc.KFOC("approx"),
        kfoc.KFOC(rank=2),
        kfoc.KFOC("exact", rank=2, rtol=1e-13, passes=60, buffer=0),
    ):
        # Draws go by the sample's number in the data of all ranks, so these are the same draws.
        options: dict[str, Any] = {"estimator": estimator, "mc_samples": 2, "seed": 7, "probes": 5}
        curvature = fitted(model, data[rank::world], **options)
        expected = kfoc.fit(model, data, **options)
        assert_same(curvature, expected, 1e-7)
        assert_on_all_ranks(curvature, world)
        for name, block in expected.items():
            found = curvature[name].report
            for key in ("fisher_error", "fisher_error_std"):
                one, all_ranks = getattr(block.report, key), getattr(found, key)
                assert math.isclose(one, all_ranks, rel_tol=1e-5, abs_tol=1e-5), (name, key)


@check
def a_block_is_that_of_the_dense_oracle(rank: int, world: int) -> None:
    model, x, y, data = data_and_model()
    curvature = fitted(model, data[rank::world], fisher="empirical", estimator=kfoc.BlockDiagonal())
    cotangents = oracle.categorical_observed(model(x).detach(), y)
    for layer in LAYERS:
        expected = oracle.fisher_block(model, layer, x, cotangents)
        torch.testing.assert_close(curvature[layer].to_dense(), expected)


class Varied(nn.Module):
    """Layers of every kind of state, one of which is only reached by batches that begin with 1."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(7, 8)
        self.norm = nn.LayerNorm(8)
        self.depthwise = nn.Conv1d(8, 8, 3, padding=1, groups=8)
        self.grouped = nn.Conv1d(8, 8, 1, groups=2)
        self.scale = nn.Parameter(torch.linspace(0.5, 1.5, 8))
        self.rare = nn.Linear(8, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.norm(self.table(tokens)).mT
        x = self.grouped(torch.tanh(self.depthwise(x))).mT.mean(1) * self.scale
        if tokens[0, 0] == 1:
            x = x + torch.tanh(self.rare(x))
        return self.head(x)


def varied_data(count: int, rare: int) -> Data:
    """`count` batches, the first `rare` of which reach every layer."""
    data = []
    for k in range(count):
        tokens = torch.randint(7, (4, 5))
        tokens[0, 0] = 1 if k < rare else 0
        data.append((tokens, torch.randint(3, (4,))))
    return data


@check
def ranks_without_data_or_without_some_layer(rank: int, world: int) -> None:
    model, data = Varied(), varied_data(5, 1)
    # All but the last rank have data, and only the first batch, of rank 0, reaches `rare`.
    mine = data[rank :: world - 1] if rank < world - 1 else []
    for estimator in (
        kfoc.KFAC(),
        kfoc.Diagonal(),
        kfoc.KFOC("exact", rtol=0, passes=300),
        kfoc.EigenCorrected(kfoc.KFAC()),
    ):
        options: dict[str, Any] = {"estimator": estimator, "fisher": "exact", "probes": 3}
        curvature = fitted(model, mine, **options)
        expected = kfoc.fit(model, data, **options)
        assert "rare" in curvature
        assert curvature.skipped == expected.skipped
        assert curvature.layouts == expected.layouts
        assert_same(curvature, expected, 1e-7)
        for name in curvature:
            a, b = curvature[name].relative_error, expected[name].relative_error
            assert abs((a or 0.0) - (b or 0.0)) < 1e-6, name
        assert_on_all_ranks(curvature, world)


@check
def layers_without_treatment_are_left_out_on_all_ranks(rank: int, world: int) -> None:
    class Misused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.head = nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.tanh(self.used(x)) + x @ self.used.weight)

    model, (x, y) = Misused(), (torch.randn(12, 4), torch.randint(2, (12,)))
    data = batches(x, y, 4)
    mine = data if rank == 0 else []
    curvature = fitted(model, mine, estimator=kfoc.KFAC())
    expected = kfoc.fit(model, data, estimator=kfoc.KFAC())
    assert curvature.skipped == expected.skipped
    assert curvature.layouts == expected.layouts
    assert_same(curvature, expected)


def excesses(
    curvature: kfoc.Curvature, model: nn.Module, inputs: Tensor, layers: tuple[str, ...]
) -> Tensor:
    """By how much the relative errors of blocks exceed those of the optima."""
    cotangents, found = oracle.categorical_exact(model(inputs).detach()), []
    for layer in layers:
        fisher = oracle.fisher_block(model, layer, inputs, cotangents)
        block = curvature[layer]
        _, _, best = oracle.optimum(fisher, *block.shape)
        found.append(oracle.relative_error(fisher, block.to_dense()) - best)
    return torch.tensor(found)


@check
def online_is_near_the_optimum(rank: int, world: int) -> None:
    """Where the ranks have different classes, and few steps in common without a buffer."""
    model, x, y = trained()
    order = y.argsort()
    data = batches(x[order], y[order], 10)
    inputs = torch.cat([batch for batch, _ in data])
    share = math.ceil(len(data) / world)
    mine = data[rank * share : (rank + 1) * share]
    for buffer in (0, 1000, 2**19):
        estimator = kfoc.KFOC(buffer=buffer)
        curvature = fitted(model, mine, fisher="exact", estimator=estimator)
        excess = excesses(curvature, model, inputs, ("0", "2", "4"))
        assert (excess > -1e-9).all(), excess
        assert (excess <= 0.003).all(), (buffer, excess)
        assert_on_all_ranks(curvature, world)


@check
def online_merges_heads_and_adds_tails(rank: int, world: int) -> None:
    model, (x, y) = convolutional(), images(45 if world == 2 else 90)
    data = batches(x, y, 5)
    shares = [data[k::world] for k in range(world)]  # of different lengths
    negligible, head.NEGLIGIBLE = head.NEGLIGIBLE, -1.0  # all half steps
    try:
        estimator = kfoc.KFOC(buffer=0)
        curvature = fitted(model, shares[rank], fisher="exact", estimator=estimator)
    finally:
        head.NEGLIGIBLE = negligible
    for layer in LAYERS:
        o, i = curvature[layer].shape
        recursions = []
        for share in shares:
            recursions.append(Recursion(o, i))
            for batch, _ in share:
                cotangents = oracle.categorical_exact(model(batch).detach())
                fisher = oracle.fisher_block(model, layer, batch, cotangents)
                recursions[-1].add(oracle.rearranged(fisher, o, i) * len(batch))
        expected = recursions[0].joined(recursions[1:]).product() / len(x)
        # A direction that rounding hides, in a batch of few dimensions, is left out there.
        atol = 5e-4 * expected.abs().max().item()
        torch.testing.assert_close(curvature[layer].to_dense(), expected, rtol=0, atol=atol)
    assert_on_all_ranks(curvature, world)


@check
def estimates_are_merged_by_their_counts(rank: int, world: int) -> None:
    model, _, _, data = data_and_model()
    mine = [data[k::world] for k in range(world)]
    options: dict[str, Any] = {"fisher": "exact", "estimator": kfoc.KFOC("running", rtol=0)}
    curvature = fitted(model, mine[rank], **options)
    parts = [kfoc.fit(model, part, **options) for part in mine]
    shares = [part.num_samples / 45 for part in parts]
    for layer in LAYERS:
        weighted = [w * p[layer].to_dense() for w, p in zip(shares, parts, strict=True)]
        total = torch.stack(weighted).sum(0)
        expected, _, _ = oracle.optimum(total, *curvature[layer].shape)
        atol = 1e-8 * expected.abs().max().item()
        torch.testing.assert_close(curvature[layer].to_dense(), expected, rtol=0, atol=atol)
    assert_on_all_ranks(curvature, world)


@check
def wrapped_models_go_by_their_own_names(rank: int, world: int) -> None:
    model, _, _, data = data_and_model()
    wrapped = DistributedDataParallel(model)
    curvature = fitted(wrapped, data[rank::world], estimator=kfoc.KFAC())
    assert_same(curvature, kfoc.fit(model, data, estimator=kfoc.KFAC()))
    assert all(p.grad is None for p in model.parameters())


class SkippedError(Exception):
    """What a check cannot be done with, and why."""


@check
def sharded_models_are_fitted_as_they_are(rank: int, world: int) -> None:
    if torch.__version__.startswith("2.6."):
        raise SkippedError("fully_shard of torch 2.6 asks for CUDA streams in its own forward")
    model, _, _, data = data_and_model()
    plain = copy.deepcopy(model)
    mesh = init_device_mesh("cpu", (world,))
    for layer in LAYERS:
        fully_shard(model.get_submodule(layer), mesh=mesh)
    fully_shard(model, mesh=mesh)
    for estimator in (kfoc.KFAC(), kfoc.KFOC("exact", rtol=0, passes=200)):
        options: dict[str, Any] = {"estimator": estimator, "fisher": "exact"}
        curvature = fitted(model, data[:8][rank::world], **options)
        expected = kfoc.fit(plain, data[:8], **options)
        assert curvature.layouts == expected.layouts
        assert_same(curvature, expected)
        assert {block.report.unchecked for block in curvature.values()} == {"sums"}
    error = error_of(lambda: fitted(model.train(rank != 1), data[:8][rank::world]))
    assert "modes of the modules" in str(error), error
    model.train()
    # A forward pass is a matter of all ranks: those with fewer batches would be waited for.
    error = error_of(lambda: fitted(model, data[: 1 + rank]))
    assert "batches" in str(error), error


@check
def traffic_is_what_is_stated(rank: int, world: int) -> None:
    model, _, _, data = data_and_model()
    ranks = Ranks()
    curvature = kfoc.fit(model, data[rank::world], estimator=kfoc.KFAC(), group=ranks)
    shapes = [block.shape for block in curvature.values()]
    sums = sum(o * o + i * i + 1 for o, i in shapes)
    assert ranks.traffic.sum_bytes == 8 * sums
    assert ranks.traffic.sums == 2  # of all layers together: factors, and counts
    assert ranks.traffic.status_bytes == 32 * ranks.traffic.statuses
    steps = math.ceil(len(data) / world)
    # Options, every step and the end of data, names, two rounds of layers and the close.
    assert ranks.traffic.statuses == 1 + steps + 1 + 1 + 2 + 1


@check
def exact_sends_one_image_a_pass(rank: int, world: int) -> None:
    model, _, _, data = data_and_model()
    sent = []
    for passes in (1, 2):
        ranks, estimator = Ranks(), kfoc.KFOC("exact", rtol=0, passes=passes, buffer=0)
        curvature = kfoc.fit(model, data[rank::world], estimator=estimator, group=ranks)
        sent.append(ranks.traffic.sum_bytes)
    shapes = [block.shape for block in curvature.values()]
    images = {8 * sum(o * o for o, _ in shapes), 8 * sum(i * i for _, i in shapes)}
    assert sent[1] - sent[0] in images, (sent, images)


def failing(data: Data, at: int) -> Iterator[tuple[Tensor, Tensor]]:
    yield from data[:at]
    raise OSError("the disk is gone")


def error_of(call: Callable[[], Any]) -> Exception:
    """What a call raises, which it must."""
    try:
        call()
    except Exception as error:
        return error
    raise AssertionError("no error")


@check
def an_error_on_a_rank_ends_all(rank: int, world: int) -> None:
    model, x, y, data = data_and_model()
    bad = (torch.full_like(x[:3], math.nan), y[:3])
    for culprit, kind, text in (
        (failing(data, 1), OSError, "disk is gone"),
        ([data[0], bad, data[1]], ValueError, "not finite"),
    ):
        mine: Any = culprit if rank == 1 else data[:2]
        error = error_of(lambda mine=mine: fitted(model, mine, estimator=kfoc.KFAC()))
        assert isinstance(error, kind if rank == 1 else RanksError), error
        assert text in str(error), error
        assert rank == 1 or f"rank 1 of {world}" in str(error), error
    # The group is as good as before.
    curvature = fitted(model, data[rank::world], estimator=kfoc.KFAC())
    assert_same(curvature, kfoc.fit(model, data, estimator=kfoc.KFAC()))


def normalised() -> nn.Sequential:
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Dropout(0.1), nn.Linear(3, 2))
    return model.eval()


def other_weight(model: nn.Sequential) -> None:
    with torch.no_grad():
        model[0].weight[0, 0] += 1e-15


OTHERS: dict[str, tuple[Callable[[nn.Sequential], Any] | None, dict[str, Any]]] = {
    "tensor '0.weight' is": (other_weight, {}),
    "tensor '1.running_mean' is": (lambda m: m[1].running_mean.add_(0.1), {}),
    "modes of the modules (train or eval) is": (lambda m: m[2].train(), {}),
    "classes and options is": (lambda m: setattr(m[1], "eps", 1e-3), {}),
    "predict is": (None, {"predict": lambda m, x: m(x) / 2}),
    "estimator is": (None, {"estimator": kfoc.Diagonal()}),
    "likelihood is": (None, {"likelihood": kfoc.Categorical(ignore_index=7)}),
    "seed is": (None, {"seed": 1}),
}


@check
def other_models_and_options_are_told_apart(rank: int, world: int) -> None:
    data = batches(torch.randn(8, 4), torch.randint(2, (8,)), 4)
    for text, (change, options) in OTHERS.items():
        torch.manual_seed(0)
        model, others = normalised(), options if rank == 1 else {}
        if change and rank == 1:
            change(model)
        common: dict[str, Any] = {"estimator": kfoc.KFAC(), "predict": lambda m, x: m(x)}
        error = error_of(lambda m=model, o=common | others: fitted(m, data, **o))
        assert isinstance(error, RanksError), error
        assert text in str(error), error

    # Functions that are defined anew, with what is a rank's own in them, are the same.
    def predict(model: nn.Module, inputs: Tensor) -> Tensor:
        return model(inputs) if rank >= 0 and "a" in {"a", "b", "c"} else inputs

    torch.manual_seed(0)
    model = normalised()
    for same in (predict, partial(predict), partial(lambda r, m, x: m(x), rank)):
        curvature = fitted(model, data, estimator=kfoc.KFAC(), predict=same)
        assert curvature.num_samples == 8 * world


@check
def no_data_anywhere_is_an_error(rank: int, world: int) -> None:
    model, _, _, _ = data_and_model()
    assert "no batches" in str(error_of(lambda: fitted(model, [])))


@check
def decay_is_refused(rank: int, world: int) -> None:
    model, _, _, data = data_and_model()
    error = error_of(lambda: fitted(model, data, estimator=kfoc.KFOC(decay=0.9)))
    assert "decay=0.9" in str(error), error


class StopError(Exception):
    """A rank that is taken away."""


class Ending(list):
    """Batches, of which so many come in all passes together."""

    def __init__(self, data: Data, number: int) -> None:
        super().__init__(data)
        self.left = number

    def __iter__(self) -> Iterator[Any]:
        for batch in super().__iter__():
            self.left -= 1
            if self.left < 0:
                raise StopError
            yield batch


@check
def a_checkpoint_is_of_one_moment_on_all_ranks(rank: int, world: int) -> None:
    """Ranks end at any moment, in the midst of a save too, and go on to the same bits."""
    model, _, _, data = data_and_model()
    folder = Path(sys.argv[3]) / "checkpoints"
    shares = [data[:4], data[4:], [], data[:1]][:world]
    for estimator, budget in (
        (kfoc.KFOC("exact", passes=3, buffer=0), None),
        (kfoc.KFOC(buffer=0, head=0), 95_000),
    ):
        options: dict[str, Any] = {"estimator": estimator, "probes": 2}
        if budget:
            options["memory_budget"] = budget
            options["storage"] = folder / f"blocks of {rank}"
            folder.mkdir(exist_ok=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            expected = fitted(model, shares[rank], **options)
            for number in (2, 3, 6, 9):
                place = folder / f"{number} {budget}"
                options["checkpoint"] = kfoc.Checkpoint(place, seconds=None, batches=2)
                options["storage"] = folder / f"{number} of {rank}" if budget else None
                ending = Ending(shares[rank], number if rank == 1 else 100)
                error = error_of(partial(fitted, model, ending, **options))
                assert isinstance(error, (StopError, RanksError)), (number, error)
                found = fitted(model, shares[rank], resume=True, **options)
                assert_same(found, expected, 1e-12)
                for block, other in zip(found.values(), expected.values(), strict=True):
                    assert block.report.steps == other.report.steps
    check_torn_save(rank, model, shares[rank], folder / "torn")
    fitted(model, shares[rank], checkpoint=folder / str(rank))  # each may have its own disk
    resume = {"checkpoint": folder / "torn", "resume": rank == 0}
    assert "resume is" in str(error_of(lambda: fitted(model, shares[rank], **resume)))


def check_torn_save(rank: int, model: nn.Module, data: Data, place: Path) -> None:
    """One rank's disk is full at the third save: the second is what all have."""
    options: dict[str, Any] = {"checkpoint": kfoc.Checkpoint(place, seconds=None, batches=1)}
    expected = fitted(model, data)
    saves = []

    def failing(path: Path, content: dict[str, Any]) -> None:
        saves.append(path)
        if rank == 1 and len(saves) == 3:
            raise OSError("no space left")
        write(path, content)

    with mock.patch("kfoc.running.checkpointed_ranks.write", failing):
        assert "no space left" in str(error_of(lambda: fitted(model, data, **options)))
    (own,) = place.glob(f"rank-{rank}-*")
    kept = sorted(file.name for file in own.iterdir())
    assert kept == ["fit-2.checkpoint"] + ["fit-3.checkpoint"] * (rank != 1)
    taken: list[int] = []
    options["progress"] = lambda progress: taken.append(progress.batch)
    assert_same(fitted(model, data, resume=True, **options), expected, 1e-12)
    assert taken == list(range(3, len(data) + 1))


class Either(nn.Module):
    """One layer for some inputs, another for others."""

    def __init__(self) -> None:
        super().__init__()
        self.negative, self.positive = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.positive(x) if x.mean() > 0 else self.negative(x)


@check
def a_budget_goes_over_ranks(rank: int, world: int) -> None:
    """Also where a rank has no data, and so meets no layer by itself; not where they disagree."""
    model, _, _, data = data_and_model()
    options: dict[str, Any] = {"estimator": kfoc.KFOC(buffer=0, head=0), "probes": 2}
    parts = [data[r :: world - 1] if r < world - 1 else [] for r in range(world)]
    expected = fitted(model, parts[rank], **options)
    passes: list[int] = []
    options["progress"] = lambda progress: passes.append(progress.pass_number)
    storage = Path(sys.argv[3]) / f"blocks of {rank}"
    found = fitted(model, parts[rank], memory_budget=95_000, storage=storage, **options)
    assert_same(found, expected, 1e-12)  # what is summed together is in another order
    assert_on_all_ranks(found, world)
    if parts[rank]:
        assert max(passes) > 1

    either = Either()
    ones = torch.full((4, 8), 1.0 if rank else -1.0)
    options = {"memory_budget": 3000, "storage": Path(sys.argv[3]) / f"none of {rank}"}
    error = error_of(lambda: fitted(either, [(ones, None)], estimator=kfoc.KFAC(), **options))
    assert isinstance(error, (ValueError, RanksError)), error
    assert "every rank's first batch must reach the same layers" in str(error), error


@check
def sharded_curvatures_solve_and_save_by_parts(rank: int, world: int) -> None:
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.LayerNorm(5), nn.Linear(5, 3))
    torch.manual_seed(1)
    data = [(torch.randn(5, 6), torch.randint(3, (5,))) for _ in range(8)]
    whole = kfoc.fit(model, data, estimator=kfoc.KFAC(), fisher="exact")
    sharded = kfoc.ShardedCurvature(whole, distributed.group.WORLD)
    assert set(sharded.owners) == set(whole)
    mine = [layer for layer, owner in sharded.owners.items() if owner == rank]
    assert list(sharded.own) == mine
    if world <= len(whole):
        assert mine
    vector = {k: torch.randn_like(p) for k, p in model.named_parameters()}
    dense = oracle_of(whole, vector)
    flat = torch.cat([vector[k].flatten() for k in dense.names])
    identity = torch.eye(len(flat))
    assert_flat(sharded.matvec(vector), dense.names, dense.matrix @ flat)
    expected = torch.linalg.solve(3 * dense.matrix + 0.1 * identity, flat)
    assert_flat(sharded.solve(vector, 0.1, scale=3.0), dense.names, expected)
    own_dampings = dict.fromkeys(whole, 0.1)
    assert_flat(sharded.solve(vector, own_dampings, scale=3.0), dense.names, expected)
    assert math.isclose(sharded.trace(), dense.matrix.trace().item(), rel_tol=1e-10)
    assert math.isclose(sharded.frobenius_norm(), dense.matrix.norm().item(), rel_tol=1e-10)
    logdet = torch.logdet(dense.matrix + 0.1 * identity).item()
    assert math.isclose(sharded.logdet(0.1), logdet, rel_tol=1e-10)
    error = error_of(lambda: sharded.solve({**vector, "more": flat}, 0.1))
    assert isinstance(error, ValueError)
    assert "more" in str(error)
    error = error_of(lambda: sharded.solve(vector, -1.0))
    assert isinstance(error, (ValueError, RanksError))
    folder = Path(sys.argv[3]) / "sharded"
    kfoc.ShardedCurvature(2 * whole, distributed.group.WORLD).save(folder)
    older = {file.name: file.read_bytes() for file in folder.iterdir()}
    Ranks().section()
    check_failed_save(sharded, folder, rank, world)
    Ranks().section()
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == older
    Ranks().section()
    sharded.save(folder, factorised=True)
    assert len(list(folder.iterdir())) == world + 1
    loaded = kfoc.ShardedCurvature.load(folder, mmap=rank == 0)
    assert list(loaded) == list(whole)
    assert loaded.skipped == whole.skipped
    assert_same(loaded, whole, 0.0)
    products = [block for block in loaded.values() if isinstance(block, kfoc.KroneckerBlock)]
    assert products
    assert all(block.kept is not None for block in products)
    Ranks().section()  # before rank 0 removes a file
    if rank == 0:
        check_mixed_saves(folder, older)


def check_failed_save(sharded: kfoc.ShardedCurvature, folder: Path, rank: int, world: int) -> None:
    """One rank's disk is full: the save before stays, and nothing of this one."""
    if rank == world - 1:
        with mock.patch("safetensors.torch.save_file", side_effect=OSError("no space left")):
            error = error_of(lambda: sharded.save(folder))
    else:
        error = error_of(lambda: sharded.save(folder))
    assert "no space left" in str(error)


def check_mixed_saves(folder: Path, older: dict[str, bytes]) -> None:
    (first,) = folder.glob("rank-00000-*")
    (old,) = [content for name, content in older.items() if name.startswith("rank-00000-")]
    first.write_bytes(old)
    error = error_of(lambda: kfoc.ShardedCurvature.load(folder))
    assert isinstance(error, ValueError)
    assert "is of another save" in str(error)
    assert first.name in str(error)
    first.unlink()
    error = error_of(lambda: kfoc.ShardedCurvature.load(folder))
    assert isinstance(error, FileNotFoundError)
    assert "lacks ['rank-00000" in str(error)


class Dense(NamedTuple):
    """F of all layers, and the order of parameters in it."""

    matrix: Tensor
    names: list[str]


def oracle_of(curvature: kfoc.Curvature, vector: dict[str, Tensor]) -> Dense:
    """The matrix of a curvature's products with unit vectors."""
    names = list(vector)
    columns = []
    for name in names:
        for k in range(vector[name].numel()):
            unit = {other: torch.zeros_like(value) for other, value in vector.items()}
            unit[name].view(-1)[k] = 1.0
            found = curvature.matvec(unit)
            columns.append(torch.cat([found[other].flatten() for other in names]))
    return Dense(torch.stack(columns, 1), names)


def assert_flat(found: dict[str, Tensor], names: list[str], expected: Tensor) -> None:
    torch.testing.assert_close(torch.cat([found[name].flatten() for name in names]), expected)


@check
def a_dead_rank_ends_the_others(rank: int, world: int) -> None:
    """Last of all: the group is of no use afterwards."""
    model, _, _, data = data_and_model()

    def dying() -> Iterator[tuple[Tensor, Tensor]]:
        yield from itertools.islice(data, 2)
        os._exit(0)

    started = time.monotonic()
    error = error_of(lambda: fitted(model, dying() if rank == world - 1 else data))
    assert isinstance(error, RanksError), error
    assert "has died, or did not answer" in str(error), error
    assert time.monotonic() - started < TIMEOUT + 3


TIMEOUT = 15.0  # seconds that a rank waits for another


def main() -> None:
    rank, world, directory = joined(TIMEOUT)
    results: dict[str, str] = {}
    for name, function in CHECKS.items():
        torch.manual_seed(0)
        try:
            function(rank, world)
            results[name] = ""
        except SkippedError as reason:
            results[name] = f"skipped: {reason}"
        except Exception:
            results[name] = traceback.format_exc()
        (directory / f"result-{rank}.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main()
    os._exit(0)  # what is left of the group has nobody to say goodbye to
