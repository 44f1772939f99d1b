"""Directories of one fit at a time, and nothing in them that is not the fit's own."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import kfoc
from kfoc.files.folder import claimed
from kfoc.running import checkpointed as checkpoints
from models import batches, convolutional, images
from test_checkpoint import StopError, cut, same

posix = pytest.mark.skipif(sys.platform == "win32", reason="no locks on directories there")


def test_links_are_not_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, (x, y) = convolutional(), images(8)
    precious = tmp_path / "precious"
    precious.write_text("mine")
    (tmp_path / "run").mkdir()
    for name in ("fit.checkpoint.tmp", "fit.checkpoint.0.kfoc-tmp"):
        (tmp_path / "run" / name).symlink_to(precious)
    monkeypatch.setattr("uuid.UUID.hex", "0")  # the very name that will be taken
    kfoc.fit(model, batches(x, y, 4), checkpoint=tmp_path / "run")
    # And where the directory was not swept before.
    (tmp_path / "fit.checkpoint.0.kfoc-tmp").symlink_to(precious)
    with pytest.raises(FileExistsError):
        checkpoints.write(tmp_path / "fit.checkpoint", {})
    monkeypatch.undo()
    (tmp_path / "link").symlink_to(precious)
    checkpoints.write(tmp_path / "link", {})  # takes the link's place
    assert precious.read_text() == "mine"


@posix
def test_a_second_fit_is_told(tmp_path: Path) -> None:
    model, (x, y) = convolutional(), images(8)
    data = batches(x, y, 4)

    def second(_: kfoc.Progress) -> None:
        with pytest.raises(ValueError, match=r"another fit is using .*: wait until it has ended"):
            kfoc.fit(model, data, checkpoint=tmp_path, resume=True)

    found = kfoc.fit(model, data, checkpoint=tmp_path, progress=second)
    assert same(found, kfoc.fit(model, data))
    kfoc.fit(model, data, checkpoint=tmp_path, resume=True)


@posix
def test_a_failed_fit_lets_go_while_its_error_is_kept(tmp_path: Path) -> None:
    model, (x, y) = convolutional(), images(12)
    data = batches(x, y, 4)
    with pytest.raises(StopError) as kept:
        kfoc.fit(model, cut(data, 2), checkpoint=tmp_path)
    assert same(kfoc.fit(model, data, checkpoint=tmp_path, resume=True), kfoc.fit(model, data))
    assert kept.tb


def in_a_child(work: Callable[[], None]) -> int:
    child = os.fork()
    if not child:
        try:
            work()
        finally:
            os._exit(1)
    return child


@posix
def test_a_killed_fit_does_not_lock_out_even_where_a_worker_lives_on(tmp_path: Path) -> None:
    read, write = os.pipe()

    def fit() -> None:
        with claimed(tmp_path):
            (tmp_path / "fit.checkpoint.half.kfoc-tmp").touch()
            worker = in_a_child(lambda: signal.pause())
            os.write(write, f"{worker}\n".encode())
            signal.pause()

    process = in_a_child(fit)
    worker = int(os.read(read, 99))
    try:
        with pytest.raises(ValueError, match="another fit is using"), claimed(tmp_path):
            pass
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
        with claimed(tmp_path):  # which removes what was half written
            assert not any(tmp_path.iterdir())
    finally:
        os.kill(worker, signal.SIGKILL)
        os.close(read)
        os.close(write)


@posix
def test_a_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*_: object) -> None:
        raise OSError("no locks")

    monkeypatch.setattr("fcntl.flock", none)
    (tmp_path / "fit.checkpoint.other.kfoc-tmp").touch()  # perhaps of a fit that goes on
    with claimed(tmp_path), claimed(tmp_path):
        assert any(tmp_path.iterdir())


def test_storage_that_another_fit_writes_to_keeps_its_files(tmp_path: Path) -> None:
    model, (x, y) = convolutional(), images(8)

    def other(_: kfoc.Progress) -> None:
        (tmp_path / "00000-000.bin").write_text("theirs")

    with pytest.raises(ValueError, match=r"has got a '00000-000.bin' from elsewhere"):
        kfoc.fit(model, batches(x, y, 4), storage=tmp_path, progress=other)
    assert (tmp_path / "00000-000.bin").read_text() == "theirs"
