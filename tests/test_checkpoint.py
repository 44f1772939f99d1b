"""Fits that are cut anywhere and go on from their checkpoint: the same bits as without a cut."""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import random
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import kfoc
from kfoc import checkpoint as checkpoints
from kfoc.interop.per_parameter import per_parameter
from models import batches, convolutional, images


class Stop(Exception):
    """In the place of a kill, in the same process."""


class Tokens(nn.Module):
    """Tokens of two vocabularies, one shared with the head, and parameters of many treatments."""

    def __init__(self) -> None:
        super().__init__()
        self.few, self.many = nn.Embedding(7, 4), nn.Embedding(1030, 4)
        self.start = nn.Parameter(torch.randn(1, 1, 4))
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.norm = nn.LayerNorm(4)
        self.recurrent = nn.GRU(4, 3, batch_first=True)
        self.late = nn.Linear(4, 4)
        self.odd = nn.Linear(4, 4)
        self.back = nn.utils.parametrizations.spectral_norm(nn.Linear(3, 4))
        self.drop = nn.Dropout(0.2)
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.few.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.few(tokens % 7) + self.many(tokens)
        x = torch.cat([self.start.expand(len(x), -1, -1), x], 1)
        x = x + self.attention(x, x, x, need_weights=False)[0]
        x = self.norm(x)
        # Its samples in the second dimension: found out by the first batch, and treated otherwise.
        x = x + self.odd(x.transpose(0, 1)).transpose(0, 1)
        if tokens[0, 0] % 2:  # not in all batches, and not in the first
            x = x + self.late(x)
        x = self.back(self.recurrent(x)[0][:, -1])
        return self.head(self.drop(x))


def tokens() -> tuple[nn.Module, list, dict[str, Any]]:
    data = [torch.randint(1030, (size, 5)) for size in (4, 5, 4, 2, 6)]
    for number, batch in enumerate(data):
        batch[0, 0] = number // 2 % 2
    return Tokens().train(), [(batch, None) for batch in data], {"fisher": "mc", "mc_samples": 2}


def mixed() -> tuple[nn.Module, list, dict[str, Any]]:
    """Convolutions of all kinds, of which one is called twice."""
    twice = nn.Conv2d(4, 4, 1)
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1),
        nn.ReLU(inplace=True),
        twice,
        nn.Conv2d(4, 4, 3, groups=4, stride=2, padding=1),
        nn.BatchNorm2d(4),
        nn.Tanh(),
        nn.Conv2d(4, 4, 3, groups=2),
        twice,
        nn.ConvTranspose2d(4, 2, 2),
        nn.Flatten(),
        nn.Linear(18, 5),
        nn.Tanh(),
        nn.Linear(5, 3),
    ).eval()
    x, y = torch.randn(17, 2, 8, 8), torch.randint(3, (17,))
    return model, batches(x, y, 4), {"fisher": "empirical", "probes": 2}


def plain() -> tuple[nn.Module, list, dict[str, Any]]:
    model, (x, y) = convolutional(torch.float32), images(25, torch.float32)
    return model, batches(x, y, 5), {"fisher": "exact", "probes": 2, "layers": ["3", "5"]}


MODELS = {"tokens": tokens, "mixed": mixed, "plain": plain}
ESTIMATORS: dict[str, Callable[[nn.Module], kfoc.Estimator]] = {
    "online": lambda _: kfoc.KFOC(),
    "small buffer": lambda _: kfoc.KFOC(buffer=300),
    "streamed": lambda _: kfoc.KFOC(buffer=0),
    "decay": lambda _: kfoc.KFOC(decay=0.9),
    "running": lambda _: kfoc.KFOC("running"),
    "approx": lambda _: kfoc.KFOC("approx"),
    "exact": lambda _: kfoc.KFOC("exact", buffer=300, passes=4),
    "rank 2": lambda _: kfoc.KFOC(rank=2, buffer=300),
    "rank 2 exact": lambda _: kfoc.KFOC("exact", rank=2, buffer=300, passes=3),
    "kfac": lambda _: kfoc.KFAC(),
    "diagonal": lambda _: kfoc.Diagonal(),
    "block diagonal": lambda _: kfoc.BlockDiagonal(max_size=5000),
    "ekfac": lambda _: kfoc.EigenCorrected(kfoc.KFAC()),
    "ekfoc": lambda _: kfoc.EigenCorrected(kfoc.KFOC("exact", buffer=300, passes=2)),
    "per parameter": lambda model: per_parameter(model),
}
# The dense block of 4 x 1,030 parameters would take a while, and says nothing of checkpoints.
TOO_LARGE = {"block diagonal": "[!m]*"}


def same(found: Any, expected: Any) -> bool:
    """Equal to the bit, in everything that a block or curvature is made of."""
    if isinstance(expected, Tensor):
        return (
            found.dtype == expected.dtype
            and found.stride() == expected.stride()
            and torch.equal(found.contiguous().view(torch.uint8), expected.contiguous().view(torch.uint8))
        )
    if isinstance(expected, kfoc.Curvature):
        numbers = ("num_samples", "skipped", "layouts", "estimator", "fisher", "seed")
        return all(getattr(found, n) == getattr(expected, n) for n in numbers) and same(
            dict(found), dict(expected)
        )
    if isinstance(expected, dict):
        return list(found) == list(expected) and all(same(found[k], expected[k]) for k in expected)
    if isinstance(expected, tuple):
        return len(found) == len(expected) and all(map(same, found, expected))
    if dataclasses.is_dataclass(expected):
        names = [field.name for field in dataclasses.fields(expected)]
        return type(found) is type(expected) and all(
            same(getattr(found, name), getattr(expected, name)) for name in names
        )
    return repr(found) == repr(expected)


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[list[Path]]:
    """Copies of all checkpoints that are written."""
    files: list[Path] = []
    write = checkpoints.write

    def keeping(path: Path, content: dict) -> None:
        write(path, content)
        files.append(tmp_path / f"kept-{len(files)}")
        shutil.copy(path, files[-1])

    monkeypatch.setattr(checkpoints, "write", keeping)
    yield files
    monkeypatch.undo()


@pytest.mark.parametrize("model_name", MODELS)
@pytest.mark.parametrize("name", ESTIMATORS)
def test_any_cut_ends_with_the_same_bits(
    name: str, model_name: str, kept: list[Path], tmp_path: Path
) -> None:
    model, data, options = MODELS[model_name]()
    options["estimator"] = ESTIMATORS[name](model)
    if model_name == "tokens" and name in TOO_LARGE:
        options["layers"] = TOO_LARGE[name]
    expected = kfoc.fit(model, data, **options)
    every = kfoc.Checkpoint(tmp_path / "run", seconds=None, batches=1)
    assert same(kfoc.fit(model, data, checkpoint=every, **options), expected)
    files = list(kept)
    limit = options["estimator"].pass_limit
    assert len(files) % len(data) == 0 and len(files) <= limit * len(data)
    for file in files:
        shutil.copy(file, every.path)
        again = kfoc.fit(model, data, checkpoint=tmp_path / "run", resume=True, **options)
        assert same(again, expected), file
