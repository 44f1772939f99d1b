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
from documents import code_blocks
from kfoc.estimators.base import State
from kfoc.files.encoding import decoded, encoded
from kfoc.running import checkpointed as checkpoints
from kfoc.running.fingerprint import Trail
from models import FEW_PASSES, batches, convolutional, images


class StopError(Exception):
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
    options = {"fisher": "mc", "mc_samples": 2, "probes": 2}
    return Tokens().train(), [(batch, None) for batch in data], options


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
}
# The dense block of 4 x 1,030 parameters would take a while, and says nothing of checkpoints.
TOO_LARGE = {"block diagonal": "[!m]*"}


def same(found: Any, expected: Any) -> bool:
    """Equal to the bit, in everything that a block or curvature is made of."""
    if isinstance(expected, Tensor):
        return (
            found.dtype == expected.dtype
            and found.stride() == expected.stride()
            and torch.equal(
                found.contiguous().view(torch.uint8), expected.contiguous().view(torch.uint8)
            )
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
    monkeypatch.setattr(os, "fsync", lambda file: None)  # which takes most of a small save
    yield files
    monkeypatch.undo()


@pytest.mark.parametrize("model_name", MODELS)
@pytest.mark.parametrize("name", ESTIMATORS)
@FEW_PASSES
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
    assert len(files) in [passes * len(data) for passes in range(1, limit + 1)]
    for file in files:
        shutil.copy(file, every.path)
        again = kfoc.fit(model, data, checkpoint=tmp_path / "run", resume=True, **options)
        assert same(again, expected), file


class Slow:
    """Batches that take a while to come."""

    def __init__(self, data: list, seconds: float) -> None:
        self.data, self.seconds = data, seconds

    def __len__(self) -> int:
        return len(self.data)

    def __iter__(self) -> Iterator[Any]:
        for batch in self.data:
            time.sleep(self.seconds)
            yield batch


def long() -> tuple[nn.Module, list, dict[str, Any]]:
    model, (x, y) = convolutional(), images(60)
    return model, batches(x, y, 4), {"probes": 4}


def long_of_tokens() -> tuple[nn.Module, list, dict[str, Any]]:
    model, data, options = tokens()
    return model, data * 3, options


KILLED = {
    "online": (long, kfoc.KFOC(buffer=2000)),
    "exact": (long, kfoc.KFOC("exact", buffer=0, passes=3)),
    "tokens": (long_of_tokens, kfoc.KFOC("exact", buffer=300, passes=3)),
    "ekfac": (long, kfoc.EigenCorrected(kfoc.KFAC())),
}


def one_fit(name: str, pause: float, **more: Any) -> kfoc.Curvature:
    torch.manual_seed(3)
    build, estimator = KILLED[name]
    model, data, options = build()
    return kfoc.fit(model, Slow(data, pause), estimator=estimator, **options, **more)


def attempt(name: str, directory: Path, slow_disk: bool, ready: Connection) -> None:
    """In a process of its own: fit, and leave the blocks beside the directory."""
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    if slow_disk:
        fsync = os.fsync
        os.fsync = lambda file: (time.sleep(0.05), fsync(file))[1]  # type: ignore[assignment]
    ready.send("ready")
    every = kfoc.Checkpoint(directory, seconds=0.0)
    found = one_fit(name, 0.015, checkpoint=every, resume=True)
    torch.save(encoded(dict(found)), directory.with_suffix(".result"))


def writing(directory: Path) -> bool:
    return any(directory.glob("*.kfoc-tmp"))


def wait_for_a_save(directory: Path, process: Any) -> None:
    while process.is_alive() and not writing(directory):
        time.sleep(0.001)


@FEW_PASSES
def test_killed_at_twenty_random_moments(tmp_path: Path) -> None:
    """By SIGKILL, again and again until the fit has come to its end; a third of them in a save."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "kfoc", "pytest"])
    moments = random.Random(0)
    kills = in_a_save = rounds = 0
    while kills < 20 or rounds < len(KILLED):
        name = list(KILLED)[rounds % len(KILLED)]
        directory = tmp_path / f"{rounds}"
        process, code, here = None, -signal.SIGKILL, 0
        while code == -signal.SIGKILL:
            parent, child = context.Pipe()
            slow_disk = here % 3 == 2
            process = context.Process(target=attempt, args=(name, directory, slow_disk, child))
            process.start()
            parent.recv()
            if here < 10:  # on a machine that is slow enough, it would never end
                if slow_disk:
                    wait_for_a_save(directory, process)
                time.sleep(moments.uniform(0, 0.03 if slow_disk else 0.2))
                process.kill()
            process.join()
            code = process.exitcode
            here += 1
            killed = code == -signal.SIGKILL
            in_a_save += killed and writing(directory)
            kills += killed
        assert code == 0
        result = torch.load(directory.with_suffix(".result"), weights_only=True)
        assert same(decoded(result, None), dict(one_fit(name, 0.0))), name
        rounds += 1
    assert in_a_save >= 3


def cut(data: list, number: int) -> Iterator[Any]:
    """Batches up to one, and then no more."""
    yield from data[:number]
    raise StopError


def interrupted(directory: Path, number: int = 3, **options: Any) -> tuple[nn.Module, list]:
    """A fit of `convolutional` that has taken in all but the last of `number` batches."""
    model, (x, y) = convolutional(), images(20)
    data = batches(x, y, 4)
    every = kfoc.Checkpoint(directory, seconds=None, batches=1)
    with pytest.raises(StopError):
        kfoc.fit(model, cut(data, number), checkpoint=every, **options)
    return model, data


@pytest.mark.parametrize("number", [2, 3, 4, 5])
def test_a_loader_that_fails(number: int, tmp_path: Path) -> None:
    model, data = interrupted(tmp_path, number)
    found = kfoc.fit(model, iter(data), checkpoint=tmp_path, resume=True)
    assert same(found, kfoc.fit(model, data))
    assert sorted(p.name for p in tmp_path.iterdir()) == [checkpoints.FILE]


def test_a_fit_that_has_ended_is_there_at_once(tmp_path: Path) -> None:
    model, (x, y) = convolutional(), images(20)
    data = batches(x, y, 5)
    calls = []
    model.register_forward_hook(lambda *_: calls.append(1))
    expected = kfoc.fit(model, data, checkpoint=tmp_path / "a" / "b", resume=True)
    calls.clear()
    assert same(kfoc.fit(model, data, checkpoint=tmp_path / "a" / "b", resume=True), expected)
    assert not calls
    for other in (data[:-1], [*data, data[0]], [data[1], data[0], *data[2:]]):
        with pytest.raises(ValueError, match="needs the same batches in the same order"):
            kfoc.fit(model, other, checkpoint=tmp_path / "a" / "b", resume=True)


def test_a_single_batch_is_still_alone(kept: list[Path], tmp_path: Path) -> None:
    model, (x, y) = convolutional(), images(20)
    kfoc.fit(model, [(x, y)], checkpoint=tmp_path)
    assert len(kept) == 1
    assert same(
        kfoc.fit(model, [(x, y)], checkpoint=tmp_path, resume=True), kfoc.fit(model, [(x, y)])
    )


def test_other_data_is_told(tmp_path: Path) -> None:
    model, data = interrupted(tmp_path)
    changed = [(x.clone(), y.clone()) for x, y in data]
    changed[1][0][2, 1, 3, 3] += 1e-9
    labels = [data[0], (data[1][0], data[1][1].roll(1)), *data[2:]]
    for other in (changed, labels, data[::-1], data[:1]):
        with pytest.raises(ValueError, match="needs the same batches in the same order"):
            kfoc.fit(model, other, checkpoint=tmp_path, resume=True)


def other_weight(model: nn.Module) -> None:
    with torch.no_grad():
        model[3].weight[0, 0] += 1e-12


@pytest.mark.parametrize(
    ("options", "change", "message"),
    [
        ({"seed": 1}, None, "seed was 0 and is 1"),
        ({"fisher": "exact"}, None, "fisher was mc and is exact"),
        ({"mc_samples": 2}, None, "mc_samples was 1 and is 2"),
        ({"probes": 2}, None, "probes was 0 and is 2"),
        ({"estimator": kfoc.KFOC(rtol=1e-3)}, None, "estimator was KFOC.*rtol=None.*rtol=0.001"),
        ({"likelihood": "gaussian"}, None, "likelihood was Categorical.* and is Gaussian"),
        ({"layers": ["3", "5"]}, None, "layers was '0', '3', '5' and is '3', '5'"),
        ({"predict": lambda m, x: m(x)}, None, "predict was None and is .*lambda"),
        ({"likelihood": kfoc.Categorical(class_dim=1)}, None, "class_dim=None.*class_dim=1"),
        ({}, lambda m: setattr(m[0], "stride", (1, 1)), "the modules' classes and options"),
        ({}, other_weight, r"tensor '3.weight' was torch.float64 trained \(6, 64\), "),
        ({}, lambda m: m[0].requires_grad_(False), "layers was"),
        ({}, lambda m: m.float(), "tensor '0.weight' was torch.float64 .* is torch.float32"),
        ({}, lambda m: m.eval(), "modes of the modules"),
        ({}, lambda m: m.__setitem__(1, nn.GELU()), "the modules' classes and options"),
    ],
)
def test_another_fit_is_told(
    options: dict[str, Any],
    change: Callable[[nn.Module], Any] | None,
    message: str,
    tmp_path: Path,
) -> None:
    model, data = interrupted(tmp_path)
    if change:
        change(model)
    with pytest.raises(ValueError, match=f"is of another fit: .*{message}"):
        kfoc.fit(model, data, checkpoint=tmp_path, resume=True, **options)


def test_another_predict_of_the_same_name_is_told(tmp_path: Path) -> None:
    first, second, third = (lambda m, x: m(x)), (lambda m, x: m(x)), (lambda m, x: m(x) / 2)
    model, data = interrupted(tmp_path, predict=first)
    with pytest.raises(ValueError, match=r"predict was .*<lambda> of code .* and is .*<lambda>"):
        kfoc.fit(model, data, checkpoint=tmp_path, resume=True, predict=third)
    kfoc.fit(model, data, checkpoint=tmp_path, resume=True, predict=second)


def test_other_versions_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, data = interrupted(tmp_path)
    monkeypatch.setattr(kfoc, "__version__", "99")
    with pytest.raises(ValueError, match=r"kfoc was .* and is 99"):
        kfoc.fit(model, data, checkpoint=tmp_path, resume=True)


def test_damaged_files_are_told(tmp_path: Path) -> None:
    model, data = interrupted(tmp_path)
    path = tmp_path / checkpoints.FILE
    whole = path.read_bytes()
    places = random.Random(0).sample(range(len(whole)), 30)
    damaged = [whole[:place] for place in places]
    for place in places:
        damaged.append(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
    for content in [*damaged, b"", whole + b"\0"]:
        path.write_bytes(content)
        with pytest.raises(ValueError, match="remove it to begin anew"):
            kfoc.fit(model, data, checkpoint=tmp_path, resume=True)
    path.write_bytes(whole)
    assert same(kfoc.fit(model, data, checkpoint=tmp_path, resume=True), kfoc.fit(model, data))


def test_a_failing_disk_leaves_the_last_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, data = interrupted(tmp_path)

    def full(content: Any, file: Any) -> None:
        file.write(b"half of it")
        raise OSError("no space left")

    with monkeypatch.context() as patched:
        patched.setattr(torch, "save", full)
        with pytest.raises(OSError, match="no space"):
            kfoc.fit(model, data, checkpoint=tmp_path, resume=True)
    assert [p.name for p in tmp_path.iterdir()] == [checkpoints.FILE]
    assert same(kfoc.fit(model, data, checkpoint=tmp_path, resume=True), kfoc.fit(model, data))


def test_bad_arguments(tmp_path: Path) -> None:
    model, data = interrupted(tmp_path / "a")
    file = tmp_path / "file"
    file.write_text("")
    for options, message in (
        ({"resume": True}, "resume=True needs the checkpoint"),
        ({"checkpoint": tmp_path / "a"}, "is there already: pass resume=True"),
        ({"checkpoint": file}, "is a file, and must be a directory"),
        ({"checkpoint": kfoc.Checkpoint(tmp_path, seconds=-1.0)}, "seconds must not be negative"),
        ({"checkpoint": kfoc.Checkpoint(tmp_path, batches=0)}, "batches must be at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            kfoc.fit(model, data, **options)


def test_intervals(kept: list[Path], tmp_path: Path) -> None:
    model, (x, y) = convolutional(), images(20)
    data = batches(x, y, 2)
    for number, (options, saves) in enumerate(
        [
            ({}, 2),  # after the first batch and at the end
            ({"seconds": 0.0}, 10),
            ({"seconds": None, "batches": 3}, 4),  # after 1, 4 and 7, and at the end
        ]
    ):
        kept.clear()
        kfoc.fit(model, data, checkpoint=kfoc.Checkpoint(tmp_path / f"{number}", **options))
        assert len(kept) == saves


def test_progress_goes_on(tmp_path: Path) -> None:
    model, data = interrupted(tmp_path)
    seen: list[kfoc.Progress] = []
    kfoc.fit(model, data, checkpoint=tmp_path, resume=True, progress=seen.append)
    assert [(p.batch, p.samples) for p in seen] == [(k, 4 * k) for k in (3, 4, 5)]


class Opaque(State):
    """A state that holds what cannot be written down."""

    def __init__(self) -> None:
        self.held = lambda: None

    def add(self, samples: Any, alone: bool) -> None: ...

    def block(self, num_samples: float) -> kfoc.Block:
        raise AssertionError("the first batch is the last")


class OfMyOwn(kfoc.Diagonal):
    def begin(self, layer: str, samples: Any) -> State:
        return Opaque()


def test_a_state_that_cannot_be_saved_shows_in_the_first_batch(tmp_path: Path) -> None:
    model, (x, y) = convolutional(), images(20)
    with pytest.raises(ValueError, match="a state holds a Opaque, which cannot be saved"):
        kfoc.fit(model, batches(x, y, 4), estimator=OfMyOwn(), checkpoint=tmp_path)


class Scaled(kfoc.Gaussian):
    """A likelihood of one's own, with an option and without a representation."""

    def __init__(self, scale: float) -> None:
        self.scale = scale

    __repr__ = object.__repr__


def test_likelihoods_of_ones_own_are_told_apart(tmp_path: Path) -> None:
    model, data = interrupted(tmp_path, likelihood=Scaled(1.0))
    with pytest.raises(ValueError, match=r"Scaled\(.*scale=1.0\) and is Scaled\(.*scale=2.0\)"):
        kfoc.fit(model, data, Scaled(2.0), checkpoint=tmp_path, resume=True)
    kfoc.fit(model, data, Scaled(1.0), checkpoint=tmp_path, resume=True)


def test_nothing_but_plain_values_is_loaded(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple:
            return os.mkdir, (str(tmp_path / "made"),)

    checkpoints.write(tmp_path / "file", {"states": Evil()})
    with pytest.raises(Exception, match=r"[Ww]eights"):
        checkpoints.read(tmp_path / "file")
    assert not (tmp_path / "made").exists()


def test_marks_of_batches() -> None:
    """Every kind of batch, and each change of it."""
    import numpy

    x, y = torch.randn(3, 10_000), torch.arange(3)
    batches_ = [
        (x, y),
        (x, y.roll(1)),
        (x.float(), y),
        (x.mT, y),
        {"input_ids": x, "labels": y},
        {"input_ids": x, "labels": None},
        (numpy.arange(4), "a"),
        (numpy.arange(4), "b"),
        (numpy.arange(4.0), "b"),
        kfoc.Progress(1, 2, 3, 4, 5, 6.0, None, False),
        ([x], y),
        (x.bool(), torch.complex(x, x)),
        (x.bool(), torch.complex(x, -x).conj()[:2]),
    ]
    digests = []
    for batch in batches_:
        trails = Trail(), Trail()
        for trail in trails:
            trail.add(batch)
        assert trails[0].digest == trails[1].digest
        digests.append(trails[0].digest)
    assert len(set(digests)) == len(digests)


def test_what_the_document_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    code, results = code_blocks("docs/checkpoints.md"), []
    for _ in range(2):
        scope: dict = {}
        exec(code[0], scope)
        results.append(scope["curvature"])
    assert same(*results)
    exec(code[1], scope)
    assert (tmp_path / "other").is_dir()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu(tmp_path: Path) -> None:
    model, (x, y) = convolutional().cuda(), images(20)
    data = batches(x, y, 4)
    for _, estimator in KILLED.values():
        directory = tmp_path / str(estimator)
        every = kfoc.Checkpoint(directory, seconds=None, batches=1)
        with pytest.raises(StopError):
            kfoc.fit(model, Cut(data), estimator=estimator, checkpoint=every)
        found = kfoc.fit(model, data, estimator=estimator, checkpoint=every, resume=True)
        assert found["5"].to_dense().is_cuda
        assert same(found, kfoc.fit(model, data, estimator=estimator))


class Cut(list):
    """Batches that come to an untimely end in every pass."""

    def __iter__(self) -> Iterator[Any]:
        return cut(list(super().__iter__()), 4)
