"""Layers in groups that fit a budget, and finished blocks in files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import kfoc
from kfoc.errors import Footprint
from kfoc.estimators import Estimator
from kfoc.fitting.layer_fit import LayerFit
from kfoc.fitting.session import Session
from kfoc.layers import tied
from kfoc.running import by_layers
from kfoc.samples import one_hot as tokens
from models import FEW_PASSES, batches, convolutional, images
from test_checkpoint import StopError
from test_same_operations import Ending

ESTIMATORS = [
    kfoc.KFOC(buffer=200),
    kfoc.KFOC(buffer=0),
    kfoc.KFOC(),
    kfoc.KFOC(aggregation="running"),
    kfoc.KFOC(aggregation="approx"),
    kfoc.KFOC(aggregation="exact", buffer=0, passes=4),
    kfoc.KFOC(aggregation="exact", passes=4, decay=None, buffer=300),
    kfoc.KFOC(rank=2, buffer=500),
    kfoc.KFOC(rank=2, buffer=500, aggregation="exact", passes=4),
    kfoc.KFOC(decay=0.9),
    kfoc.KFAC(),
    kfoc.EigenCorrected(kfoc.KFAC()),
    kfoc.EigenCorrected(kfoc.KFOC(buffer=100)),
    kfoc.Diagonal(),
    kfoc.BlockDiagonal(),
]


class Everything(nn.Module):
    """An embedding tied to the head, attention, loose parameters, a skipped and an unused layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(9, 6)
        self.token = nn.Parameter(torch.randn(1, 6))
        self.norm = nn.LayerNorm(6)
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)
        self.recurrent = nn.LSTM(6, 6, batch_first=True)
        self.depthwise = nn.Conv1d(6, 6, 3, padding=1, groups=6)
        self.grouped = nn.Conv1d(6, 6, 3, padding=1, groups=2)
        self.bag = nn.EmbeddingBag(9, 6, scale_grad_by_freq=True)
        self.unused = nn.Linear(3, 3)
        self.drop = nn.Dropout(0.3)
        self.head = nn.Linear(6, 9, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.embed(x) + self.token)
        y = y + self.attention(y, y, y, need_weights=False)[0]
        y = self.drop(y) + self.recurrent(y)[0]
        y = self.grouped(self.depthwise(y.mT)).mT
        return self.head(y.mean(1) + self.bag(x))


def sentences(count: int = 10, size: int = 3) -> list[tuple[Tensor, Tensor]]:
    torch.manual_seed(1)
    x, y = torch.randint(9, (count, 5)), torch.randint(9, (count,))
    return batches(x, y, size)


def everything() -> Everything:
    torch.manual_seed(0)
    return Everything()


def check_same(found: kfoc.Curvature, expected: kfoc.Curvature) -> None:
    """To the last bit, reports and what was left out included."""
    assert list(found) == list(expected)
    for name, block in expected.items():
        assert type(found[name]) is type(block)
        assert found[name].report == block.report
        for a, b in zip(found[name].tensors(), block.tensors(), strict=True):
            assert torch.equal(a, b), name
    assert found.skipped == expected.skipped
    assert found.layouts == expected.layouts
    assert (found.num_samples, found.estimator) == (expected.num_samples, expected.estimator)
    assert (found.fisher, found.seed, found.counts) == (
        expected.fisher,
        expected.seed,
        expected.counts,
    )
    assert str(found.coverage) == str(expected.coverage)


def tensors_in(value: Any, found: dict[int, int]) -> dict[int, int]:
    """Bytes of every piece of memory that an object's tensors lie in, by its address."""
    if isinstance(value, Tensor):
        held = value.untyped_storage()
        found[held.data_ptr()] = held.nbytes()
    elif isinstance(value, dict):
        for item in value.values():
            tensors_in(item, found)
    elif isinstance(value, (list, tuple)):
        for item in value:
            tensors_in(item, found)
    elif type(value).__module__.startswith("kfoc") and hasattr(value, "__dict__"):
        tensors_in(vars(value), found)
    return found


def size_of(value: Any) -> int:
    return sum(tensors_in(value, {}).values())


class Watch:
    """Follows the states of a fit: what they hold together after every batch, and the sweeps."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.peak = 0
        self.groups: list[list[str]] = []
        self.footprints: dict[str, Footprint] = {}
        self.worst: dict[str, int] = {}
        self.blocks: dict[str, int] = {}
        one_batch, ended, one_block = Session._take, Session.curvature, LayerFit.block
        takes = by_layers._Sweeps.takes
        self.kept = 0

        def batch(session: Session, *args: Any) -> None:
            one_batch(session, *args)
            each = {n: size_of([f.state, f.probes]) for n, f in session.fitted.items()}
            self.worst = {n: max(each.get(n, 0), self.worst.get(n, 0)) for n in each | self.worst}
            self.peak = max(self.peak, sum(each.values()) + self.kept)

        def curvature(session: Session, *args: Any) -> kfoc.Curvature:
            self.groups.append(sorted(session.fitted))
            return ended(session, *args)

        def asked(sweeps: Any, session: Session, layer: LayerFit, samples: Any) -> bool:
            layer.measure(session.task, session.estimator, samples)
            assert layer.footprint is not None
            self.footprints[layer.name] = layer.footprint
            self.kept = 0 if sweeps.by.files else size_of(sweeps.blocks)
            return takes(sweeps, session, layer, samples)

        def block(layer: LayerFit, *args: Any, **options: Any) -> kfoc.Block:
            found = one_block(layer, *args, **options)
            self.blocks[layer.name] = size_of(list(found.tensors()))
            return found

        monkeypatch.setattr(Session, "_take", batch)
        monkeypatch.setattr(Session, "curvature", curvature)
        monkeypatch.setattr(LayerFit, "block", block)
        monkeypatch.setattr(by_layers._Sweeps, "takes", asked)


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Watch:
    return Watch(monkeypatch)


def largest(watch: Watch) -> int:
    """The smallest budget that every layer fits by itself."""
    return max(max(each) + each.block for each in watch.footprints.values())


@pytest.mark.parametrize("estimator", ESTIMATORS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@FEW_PASSES
def test_groups_fit_the_budget_and_change_nothing(
    estimator: Estimator, dtype: torch.dtype, watch: Watch, tmp_path: Path
) -> None:
    options: dict = {"estimator": estimator, "probes": 2}
    data = sentences()
    expected = kfoc.fit(everything().to(dtype), data, **options)
    kfoc.fit(everything().to(dtype), data, memory_budget=2**40, **options)
    assert len(watch.groups) == 2
    budget = largest(watch)
    for name, estimate in watch.footprints.items():
        assert watch.worst[name] <= estimate.state, name
        assert watch.blocks[name] <= estimate.block, name
    watch.peak, watch.groups = 0, []
    model = everything().to(dtype)
    found = kfoc.fit(model, data, memory_budget=budget, storage=tmp_path / "blocks", **options)
    assert len(watch.groups) > 1
    assert sorted(name for group in watch.groups for name in group) == sorted(expected)
    assert 0 < watch.peak <= budget
    check_same(found, expected)
    assert {"unused", "head"} <= found.skipped.keys()
    assert "token" in str(found.parameters)
    assert "recurrent" in found


@pytest.mark.parametrize("fisher", ["mc", "exact", "empirical"])
def test_convolutions_under_every_fisher(fisher: str, tmp_path: Path) -> None:
    model, data = convolutional(), batches(*images(30), 7)
    options: dict = {"fisher": fisher, "estimator": kfoc.KFOC(buffer=0, head=1)}
    expected = kfoc.fit(model, data, **options)
    found = kfoc.fit(model, data, memory_budget=2 * 102_000, storage=tmp_path, **options)
    check_same(found, expected)


def test_large_vocabularies(monkeypatch: pytest.MonkeyPatch, watch: Watch, tmp_path: Path) -> None:
    monkeypatch.setattr(tokens, "FULL_VOCABULARY", 4)
    assert tied.vocabularies.FULL_VOCABULARY == 4
    for number, estimator in enumerate([kfoc.KFOC(buffer=400), kfoc.KFAC(), kfoc.KFOC(rank=2)]):
        watch.footprints, watch.worst, watch.groups = {}, {}, []
        expected = kfoc.fit(everything().float(), sentences(), estimator=estimator)
        kfoc.fit(
            everything().float(), sentences(), estimator=estimator, storage=tmp_path / f"{number}"
        )
        options: dict = {"estimator": estimator, "storage": tmp_path / f"{number}b"}
        kfoc.fit(everything().float(), sentences(), estimator=estimator, memory_budget=2**40)
        for name, estimate in watch.footprints.items():
            assert watch.worst[name] <= estimate.state, name
            assert watch.blocks[name] <= estimate.block, name
        budget = largest(watch)
        check_same(
            kfoc.fit(everything().float(), sentences(), memory_budget=budget, **options), expected
        )


def test_blocks_that_stay_in_memory_count(watch: Watch) -> None:
    """States that take more than their blocks go in groups without any file."""
    estimator = kfoc.KFOC(buffer=3000, head=0)
    model, data = convolutional(), batches(*images(60), 7)
    expected = kfoc.fit(model, data, estimator=estimator)
    blocks = sum(t.nbytes for b in expected.values() for t in b.tensors())
    watch.groups, watch.peak = [], 0
    kfoc.fit(model, data, estimator=estimator, memory_budget=2**40)
    alone, watch.groups, watch.peak = watch.peak, [], 0
    budget = int(2.6 * blocks)  # the largest layer's state, its block, and the others' blocks
    found = kfoc.fit(model, data, estimator=estimator, memory_budget=budget)
    check_same(found, expected)
    assert len(watch.groups) > 1
    assert watch.peak <= budget
    assert watch.peak < alone


def test_files_of_the_user_are_left_alone(tmp_path: Path) -> None:
    model, data = convolutional(), batches(*images(20), 7)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("all of it")
    with pytest.raises(ValueError, match="is not empty"):
        kfoc.fit(model, data, storage=tmp_path / "mine")
    assert [file.name for file in (tmp_path / "mine").iterdir()] == ["thesis.txt"]
    with pytest.raises(ValueError, match="is a file"):
        kfoc.fit(model, data, storage=tmp_path / "mine" / "thesis.txt")
    with pytest.raises(FileNotFoundError, match="no folder to make"):
        kfoc.fit(model, data, storage=tmp_path / "missing" / "blocks")
    broken = [data[0], (data[1][0] * torch.nan, data[1][1])]
    with pytest.raises(ValueError, match="batch 1"):
        kfoc.fit(model, broken, storage=tmp_path / "failed")
    assert not (tmp_path / "failed").exists()


def test_stored_blocks_are_used_as_any_others(tmp_path: Path) -> None:
    model, data = convolutional(), batches(*images(20), 7)
    expected = kfoc.fit(model, data)
    found = kfoc.fit(model, data, storage=tmp_path / "blocks")
    vector = {name: torch.randn_like(p) for name, p in model.named_parameters()}
    for name, value in found.solve(vector, 0.1).items():
        assert torch.equal(value, expected.solve(vector, 0.1)[name])
    found.save(tmp_path / "copy.safetensors")
    check_same(kfoc.Curvature.load(tmp_path / "copy.safetensors"), expected)
    before = {f.name: f.read_bytes() for f in (tmp_path / "blocks").iterdir()}
    next(iter(found.values())).left.mul_(2.0)  # written to a copy of its page
    assert before == {f.name: f.read_bytes() for f in (tmp_path / "blocks").iterdir()}


def test_budgets_that_cannot_be_held(tmp_path: Path) -> None:
    model, data = convolutional(), batches(*images(20), 7)
    with pytest.raises(ValueError, match="positive number of bytes, found -1"):
        kfoc.fit(model, data, memory_budget=-1)
    with pytest.raises(ValueError, match=r"finished blocks of .* alone take .* storage="):
        kfoc.fit(model, data, memory_budget=36_000, estimator=kfoc.KFAC())
    with pytest.raises(ValueError, match=r"layer '.*' takes .* more than memory_budget=5000"):
        kfoc.fit(model, data, memory_budget=5000, storage=tmp_path / "blocks")
    assert not (tmp_path / "blocks").exists()
    options: dict = {"estimator": kfoc.KFOC(buffer=0, head=0), "storage": tmp_path / "other"}
    with pytest.raises(ValueError, match="an iterator can be read once"):
        kfoc.fit(model, iter(data), memory_budget=2 * 35_000, **options)


def test_progress_counts_the_passes_of_all_sweeps(watch: Watch, tmp_path: Path) -> None:
    model, data = convolutional(), batches(*images(20), 7)
    seen: list[kfoc.Progress] = []
    options: dict = {"estimator": kfoc.KFOC(buffer=0, head=0), "storage": tmp_path / "blocks"}
    kfoc.fit(model, data, memory_budget=70_000, progress=seen.append, **options)
    assert len(watch.groups) > 1
    assert [one.pass_number for one in seen] == [
        k for k in range(1, len(watch.groups) + 1) for _ in data
    ]


@pytest.mark.parametrize("batch", range(1, 6))
def test_a_budgeted_fit_is_resumed_in_the_midst_of_any_sweep(
    batch: int, tmp_path: Path, watch: Watch, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.fsync", lambda file: None)
    model, data = convolutional(), batches(*images(20), 7)
    options: dict = {"estimator": kfoc.KFOC(buffer=0, head=0), "memory_budget": 70_000}
    expected = kfoc.fit(model, data, **options, storage=tmp_path / "blocks")
    assert (len(watch.groups), len(data)) == (2, 3)
    every = kfoc.Checkpoint(tmp_path / "saved", seconds=None, batches=1)
    with pytest.raises(StopError):
        kfoc.fit(model, Ending(data, batch), checkpoint=every, storage=tmp_path / "cut", **options)
    assert not (tmp_path / "cut").exists()
    options |= {"checkpoint": every, "resume": True, "storage": tmp_path / "cut"}
    seen: list[kfoc.Progress] = []
    check_same(kfoc.fit(model, data, progress=seen.append, **options), expected)
    # One batch is read ahead, but for the last of a sweep.
    assert len(seen) == 6 - (batch if batch % 3 == 0 else batch - 1)
    with pytest.raises(ValueError, match="memory_budget was 70000 and is 80000"):
        kfoc.fit(model, data, **options | {"memory_budget": 80_000, "storage": tmp_path / "more"})
