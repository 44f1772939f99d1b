"""Fits in several threads at once: of different models, and of the same one."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

import kfoc
from kfoc.common.threads import UNCOMPILED, seeded
from kfoc.layers.select import select
from kfoc.model.hooks import captured
from models import batches, convolutional, images


@pytest.fixture(autouse=True)
def _frequent_switches() -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


def together(*tasks: Callable[[], Any]) -> list[Any]:
    """The results of tasks that all run at once."""
    results: dict[int, Any] = {}
    barrier = threading.Barrier(len(tasks))

    def run(number: int) -> None:
        barrier.wait()
        results[number] = tasks[number]()

    threads = [threading.Thread(target=run, args=(number,)) for number in range(len(tasks))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [results[number] for number in range(len(tasks))]


def fitting(model: nn.Module, data: Any, **options: Any) -> Callable[[], kfoc.Curvature]:
    return lambda: kfoc.fit(model, data, **options)


def check_same(tasks: list[Callable[[], kfoc.Curvature]], times: int) -> None:
    """What tasks give at once is what they give one after the other."""
    expected = [task() for task in tasks]
    random_state = torch.get_rng_state()
    for _ in range(times):
        for first, second in zip(expected, together(*tasks), strict=True):
            assert list(first) == list(second)
            for layer in first:
                assert torch.equal(first[layer].to_dense(), second[layer].to_dense()), layer
        assert torch.equal(torch.get_rng_state(), random_state)


def test_models_that_draw() -> None:
    tasks = []
    for seed in range(3):
        model = convolutional()
        model.insert(5, nn.Dropout())
        tasks.append(fitting(model.train(), batches(*images(40), 2), seed=seed))
    check_same(tasks, 4)


def test_one_model_in_several_threads() -> None:
    model = convolutional()
    check_same([fitting(model, batches(*images(40), 2)) for _ in range(3)], 4)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_one_model_whose_modules_are_replayed() -> None:
    class Attending(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
            self.head = nn.Linear(4, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.attention(x, x, x)[0].sum(1))

    model = Attending().eval()
    data = [[(torch.randn(2, 3, 4), None)] * 15 for _ in range(3)]
    check_same([fitting(model, each, likelihood="gaussian") for each in data], 4)


def test_a_model_that_others_run_meanwhile() -> None:
    """Their calls are no samples."""
    model, data = convolutional(), batches(*images(60), 2)
    expected, done = kfoc.fit(model, data), threading.Event()

    def fit() -> kfoc.Curvature:
        try:
            return kfoc.fit(model, data)
        finally:
            done.set()

    def run() -> None:
        while not done.is_set():
            model(data[0][0])

    found, _ = together(fit, run)
    for layer in expected:
        assert torch.equal(found[layer].to_dense(), expected[layer].to_dense())


def test_a_fit_inside_of_a_forward_pass() -> None:
    inner, outer = convolutional(), convolutional()
    data = batches(*images(8), 4)
    expected = kfoc.fit(inner, data), kfoc.fit(outer, data)
    seen = []

    def predict(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
        seen.append(kfoc.fit(inner, data))
        return model(x)

    found = kfoc.fit(outer, data, predict=predict)
    for layer in found:
        assert torch.equal(found[layer].to_dense(), expected[1][layer].to_dense())
        assert torch.equal(seen[0][layer].to_dense(), expected[0][layer].to_dense())


def test_seeded_sections_exclude_each_other() -> None:
    def draw(seed: int) -> list[float]:
        found = []
        for _ in range(50):
            with seeded(seed, cuda=False):
                found.append(torch.rand(3).sum().item() + torch.rand(1).item())
        return found

    before = torch.get_rng_state()
    for each in together(*(lambda seed=seed: draw(seed) for seed in range(3))):
        assert len(set(each)) == 1
    assert torch.equal(torch.get_rng_state(), before)


def test_compilation_is_back_in_force_after_the_last_of_overlapping_fits() -> None:
    pytest.importorskip("torch._dynamo")
    from torch._dynamo import eval_frame

    before = eval_frame._stance.stance
    first = second = UNCOMPILED
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert eval_frame._stance.stance == "force_eager"
    second.__exit__(None, None, None)
    assert eval_frame._stance.stance == before


def test_hooks_of_a_fit_that_ended_meanwhile_do_nothing() -> None:
    model, x = nn.Linear(3, 2), torch.randn(4, 3)
    with captured(select(model, None)) as record:
        (before,), (after,) = model._forward_pre_hooks.values(), model._forward_hooks.values()
        # As torch calls them once their entry among those with keyword arguments is gone.
        assert before(model, (x,)) is None
        assert after(model, (x,), model(x)) is None
        assert len(record.calls[""]) == 1  # that of model(x) itself
