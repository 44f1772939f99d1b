"""What goes on from a saved state does the very operations that it would have done without the cut.

The same bits on one machine may be luck: whether `mm` and `bmm` round alike, or a sum over memory
that lies otherwise, is a matter of the processor. So it is the operations that are compared, with
the shapes, strides and alignment of their tensors.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import kfoc
from kfoc.fitting.session import Session
from models import FEW_PASSES, batches, convolutional, images
from test_checkpoint import ESTIMATORS, MODELS, StopError

# What only moves, makes or names memory rounds nothing (and a mask is made once in a process).
MOVES = frozenset(
    [
        "alias",
        "as_strided",
        "cat",
        "clone",
        "copy_",
        "detach",
        "detach_",
        "empty",
        "empty_like",
        "empty_strided",
        "equal",
        "expand",
        "fill_",
        "item",
        "lift_fresh",
        "new_empty",
        "new_empty_strided",
        "new_zeros",
        "ones",
        "permute",
        "select",
        "set_",
        "slice",
        "split",
        "split_with_sizes",
        "squeeze",
        "stack",
        "t",
        "transpose",
        "triu",
        "tril",
        "unbind",
        "unfold",
        "unsqueeze",
        "view",
        "view_as_real",
        "zero_",
        "zeros",
        "zeros_like",
        "_local_scalar_dense",
        "_reshape_alias",
        "_to_copy",
        "_unsafe_view",
    ]
)


class Log(TorchDispatchMode):
    """The operations that round, each with how its tensors lie."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple] = []
        self.calls: list[int] = []  # of the model: the number of operations before each

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None):  # type: ignore[no-untyped-def]
        name = function.overloadpacket.__name__
        if name not in MOVES and not name.startswith("_record_function"):
            told = tuple(map(_told, tree_leaves((args, kwargs))))
            self.operations.append((name, *told))
        return function(*args, **(kwargs or {}))

    def since(self, calls: int) -> list[tuple]:
        """From so many calls of the model before the end on."""
        return self.operations[self.calls[-calls] :]


def _told(value: Any) -> Any:
    if isinstance(value, Tensor):
        place = value.data_ptr() % 64 if value.numel() else 0
        return value.dtype, tuple(value.shape), value.stride(), place
    return None if isinstance(value, torch.Generator) else repr(value)


def logged(model: nn.Module, work: Callable[[], Any]) -> Log:
    with Log() as log:
        handle = model.register_forward_pre_hook(lambda *_: log.calls.append(len(log.operations)))
        try:
            work()
        finally:
            handle.remove()
    return log


class Ending:
    """Batches, of which so many come in all passes together."""

    def __init__(self, data: list, number: int) -> None:
        self.data, self.left = data, number

    def __iter__(self) -> Iterator[Any]:
        for batch in self.data:
            self.left -= 1
            if self.left < 0:
                raise StopError
            yield batch


@FEW_PASSES
@pytest.mark.parametrize(
    ("model_name", "name"),
    [*(("mixed", name) for name in ESTIMATORS)]
    + [("tokens", name) for name in ("small buffer", "rank 2", "kfac", "ekfoc")],
)
def test_a_resumed_fit(
    model_name: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.fsync", lambda file: None)
    model, data, options = MODELS[model_name]()
    data = data[:3]
    options["estimator"] = ESTIMATORS[name](model)
    options["verify"] = False  # which goes before the first batch that is taken in, whichever
    expected = logged(model, lambda: kfoc.fit(model, data, **options))
    for number in (2, 5)[: min(2, options["estimator"].pass_limit)]:
        directory = tmp_path / str(number)
        every = kfoc.Checkpoint(directory, seconds=None, batches=1)
        with pytest.raises(StopError):
            kfoc.fit(model, Ending(data, number), checkpoint=every, **options)
        options["checkpoint"] = directory
        found = logged(model, lambda: kfoc.fit(model, data, resume=True, **options))
        del options["checkpoint"]
        assert found.since(len(found.calls)) == expected.since(len(found.calls))


@pytest.fixture
def unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    """The check goes before the first batch of a tracker, and comes again when it is loaded."""
    begin = kfoc.Tracker._new

    def unchecked(tracker: kfoc.Tracker) -> Session:
        session = begin(tracker)
        session.reader.task = replace(session.task, verify=False)
        return session

    monkeypatch.setattr(kfoc.Tracker, "_new", unchecked)


def through_a_file(state: dict) -> dict:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


DECAYING = ["online", "running", "approx", "kfac", "diagonal", "block diagonal"]


@pytest.mark.parametrize(
    ("name", "decay"),
    [(name, 0.9) for name in DECAYING]
    + [(name, 1.0) for name in (*DECAYING, "small buffer", "streamed", "rank 2")],
)
@pytest.mark.usefixtures("unchecked")
def test_a_loaded_tracker(name: str, decay: float) -> None:
    model, data, options = MODELS["mixed"]()
    options.pop("probes")
    options["estimator"] = ESTIMATORS[name](model)
    trackers = [kfoc.Tracker(model, decay=decay, **options) for _ in range(2)]
    for inputs, targets in data[:2]:
        trackers[0].update(inputs, targets)
    trackers[1].load_state_dict(through_a_file(trackers[0].state_dict()))

    def go_on(tracker: kfoc.Tracker) -> None:
        for inputs, targets in data[2:4]:
            tracker.update(inputs, targets)
        tracker.curvature()

    logs = [logged(model, lambda tracker=tracker: go_on(tracker)) for tracker in trackers]
    assert logs[1].operations == logs[0].operations


@pytest.mark.usefixtures("unchecked")
def test_a_loaded_optimizer() -> None:
    model, (x, y) = convolutional(), images(20)
    data = batches(x, y, 5)

    def train(optimizer: kfoc.NaturalGradient, part: list) -> None:
        for inputs, targets in part:
            optimizer.observe(inputs)
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(inputs), targets).backward()
            optimizer.step()

    first = kfoc.NaturalGradient(model)
    train(first, data[:2])
    saved = through_a_file({"model": model.state_dict(), "optimizer": first.state_dict()})
    expected = logged(model, lambda: train(first, data[2:]))
    model.load_state_dict(saved["model"])
    second = kfoc.NaturalGradient(model)
    second.load_state_dict(saved["optimizer"])
    assert logged(model, lambda: train(second, data[2:])).operations == expected.operations
