"""What a fit tells of itself while it runs: to a callable, or on standard error."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sized
from dataclasses import dataclass, field
from typing import Any, NamedTuple

# Seconds between two lines: on a terminal, where a line replaces the last, and in a log.
TERMINAL_INTERVAL, LOG_INTERVAL = 0.2, 10.0


class Progress(NamedTuple):
    """Where a fit is, after a batch.

    Attributes:
        pass_number: the pass over the data, from 1.
        pass_limit: at most so many passes; an iteration may settle before.
        batch: batches done in this pass, from 1.
        batches: batches in a pass: the loader's length, or as counted in the first pass; None
            where neither is known.
        samples: samples done in this pass.
        seconds: since the start of this pass.
        change: by how much sigma changed in the last pass, relative, at the layer where it changed
            most: what `rtol` is about. None where there is no iteration over passes.
        last: whether this was the pass's last batch.
    """

    pass_number: int
    pass_limit: int
    batch: int
    batches: int | None
    samples: int
    seconds: float
    change: float | None
    last: bool

    @property
    def rate(self) -> float:
        """Samples a second, in this pass."""
        return self.samples / max(self.seconds, 1e-9)

    @property
    def remaining(self) -> float | None:
        """Estimated seconds to the end of this pass, where the number of batches is known."""
        if self.batches is None:
            return None
        return self.seconds * max(self.batches - self.batch, 0) / self.batch

    def __str__(self) -> str:
        passes = f"pass {self.pass_number}"
        if self.pass_limit > 1:
            passes += f" of at most {self.pass_limit}"
        batches = "" if self.batches is None else f" of {self.batches}"
        parts = [passes, f"batch {self.batch}{batches}", f"{self.samples} samples"]
        parts.append(f"{self.rate:.3g}/s" if self.rate < 1000 else f"{self.rate:.0f}/s")
        if self.last:
            parts.append(f"took {_duration(self.seconds)}")
        elif self.remaining is not None:
            parts.append(f"{_duration(self.remaining)} left")
        if self.change is not None:
            parts.append(f"sigma changed by {self.change:.1e}")
        return ", ".join(parts)


# What is called with the progress after every batch.
Report = Callable[[Progress], Any]


class Printer:
    """Prints progress on standard error: one line that is written over on a terminal, and
    otherwise a line every few seconds, without control characters."""

    def __init__(self) -> None:
        self.shown = time.perf_counter()
        self.width = 0

    def __call__(self, progress: Progress) -> None:
        now, terminal = time.perf_counter(), sys.stderr.isatty()
        interval = TERMINAL_INTERVAL if terminal else LOG_INTERVAL
        if not progress.last and now - self.shown < interval:
            return
        self.shown, line = now, f"kfoc: {progress}"
        if not terminal:
            print(line, file=sys.stderr, flush=True)
            return
        padded = line.ljust(self.width)  # to cover what a longer line left
        self.width = 0 if progress.last else len(line)
        print(f"\r{padded}", end="\n" if progress.last else "", file=sys.stderr, flush=True)


@dataclass
class Meter:
    """Counts one pass over the data, and reports it.

    Attributes:
        report: gets the progress after every batch.
        number: of the pass, from 1.
        limit: of passes.
        batches: in a pass, where that is known.
        change: of sigma in the last pass.
        start: of the pass.
    """

    report: Report
    number: int
    limit: int
    batches: int | None
    change: float | None
    start: float = field(default_factory=time.perf_counter)

    def show(self, batch: int, samples: int, last: bool) -> None:
        """Report after `batch` batches with `samples` samples."""
        seconds = time.perf_counter() - self.start
        batches = batch if last else self.batches
        self.report(
            Progress(self.number, self.limit, batch, batches, samples, seconds, self.change, last)
        )


def reporter(progress: bool | Report) -> Report | None:
    """What to call after every batch.

    Raises:
        ValueError: neither a truth value nor callable.
    """
    if isinstance(progress, bool):
        return Printer() if progress else None
    if callable(progress):
        return progress
    raise ValueError(
        "progress must be True, False, or a callable that takes a kfoc.Progress, found "
        f"{progress!r}"
    )


def length(data: object) -> int | None:
    """How many batches `data` says that it has; None where it does not."""
    if not isinstance(data, Sized):
        return None
    try:
        return len(data)
    except TypeError:  # a DataLoader over an iterable data set
        return None


def _duration(seconds: float) -> str:
    """Such as "0.4 s", "12 s", "3 min 5 s", "2 h 10 min"."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
