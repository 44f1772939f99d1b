"""What a fit tells of itself: to a callable, on a terminal, in a log."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator

import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset

import kfoc
from kfoc.running.progress import Printer, length
from models import FEW_PASSES, batches, convolutional, images


def collected(data: object, **options: object) -> list[kfoc.Progress]:
    found: list[kfoc.Progress] = []
    kfoc.fit(convolutional(), data, progress=found.append, **options)  # type: ignore[arg-type]
    return found


def test_a_callable_gets_every_batch() -> None:
    x, y = images(10)
    found = collected(batches(x, y, 4))
    assert [(p.batch, p.batches, p.samples, p.last) for p in found] == [
        (1, 3, 4, False),
        (2, 3, 8, False),
        (3, 3, 10, True),
    ]
    assert all(p.pass_number == p.pass_limit == 1 and p.change is None for p in found)
    assert found[0].remaining == pytest.approx(2 * found[0].seconds)
    assert found[-1].remaining == 0
    assert found[-1].rate == pytest.approx(10 / found[-1].seconds)


def test_without_a_length() -> None:
    x, y = images(10)
    found = collected(iter(batches(x, y, 4)))
    assert [p.batches for p in found] == [None, None, 3]
    assert found[0].remaining is None
    assert "left" not in str(found[0])


@FEW_PASSES
def test_passes_and_the_change_of_sigma() -> None:
    x, y = images(40)
    estimator = kfoc.KFOC("exact", rtol=1e-12, buffer=0, passes=6)

    # A generator function behind an iterable without a length: counted in the first pass.
    class Stream:
        def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
            return iter(batches(x, y, 10))

    found = collected(Stream(), estimator=estimator)
    last = [p for p in found if p.last]
    assert [p.pass_number for p in last] == list(range(1, len(last) + 1))
    assert {p.pass_limit for p in found} == {6}
    assert found[4].batches == 4
    changes = [p.change for p in last]
    assert changes[:3] == [None, None, None]
    known = [c for c in changes if c is not None]
    assert known
    assert known[-1] < known[0] < 1
    assert "of at most 6" in str(last[-1])
    assert "sigma changed by" in str(last[-1])


@pytest.mark.parametrize(
    "estimator",
    [
        kfoc.EigenCorrected(kfoc.KFOC("exact", buffer=0, passes=4)),
        kfoc.KFOC("exact", rank=2, buffer=0, passes=4),
    ],
    ids=["eigen-corrected", "rank 2"],
)
@FEW_PASSES
def test_every_estimator_of_several_passes_tells_its_change(estimator: kfoc.Estimator) -> None:
    x, y = images(40)
    assert any(p.change is not None for p in collected(batches(x, y, 10), estimator=estimator))


def test_a_log_gets_whole_lines_and_few(capsys: pytest.CaptureFixture[str]) -> None:
    x, y = images(40)
    kfoc.fit(convolutional(), batches(x, y, 1), progress=True)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("kfoc: pass 1, batch 40 of 40, 40 samples, ")
    assert "\r" not in lines[0]


def progress(batch: int, last: bool = False) -> kfoc.Progress:
    return kfoc.Progress(1, 1, batch, 100, 4 * batch, 2.0 * batch, None, last)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_gets_one_line_that_is_written_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kfoc.running.progress.TERMINAL_INTERVAL", 0.0)
    monkeypatch.setattr(sys, "stderr", Terminal())
    printer = Printer()
    for batch in (1, 2):
        printer(progress(batch))
    printer(progress(100, last=True))
    _, first, second, third = sys.stderr.getvalue().split("\r")  # type: ignore[attr-defined]
    assert first.strip() == "kfoc: pass 1, batch 1 of 100, 4 samples, 2/s, 3 min 18 s left"
    assert "3 min 16 s left" in second
    assert len(third) >= len(second) + 1  # it covers the line before
    assert third.endswith("\n")


def test_lengths() -> None:
    class Endless(IterableDataset):
        def __iter__(self) -> Iterator[int]:
            return iter(range(3))

    assert length([1, 2]) == 2
    assert length(iter([1])) is None
    assert length(DataLoader(Endless())) is None


def test_bad_progress() -> None:
    with pytest.raises(ValueError, match="progress must be True, False, or a callable"):
        kfoc.fit(convolutional(), [], progress="yes")  # type: ignore[arg-type]
