"""Fits that can be interrupted at any moment: their state in a file, and on from there."""

from __future__ import annotations

import copy
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from kfoc.files.encoding import written
from kfoc.files.folder import claimed, read, write
from kfoc.files.hints import check_all
from kfoc.fitting.saved import checked, load, state_of
from kfoc.fitting.session import Session
from kfoc.layers.attention import part_name
from kfoc.model.buffers import put
from kfoc.running.fingerprint import Trail, differences, of_task
from kfoc.running.local import Unkept

FILE = "fit.checkpoint"
_END = object()
# Of the file: a session in plain terms, and what there is beside it.
_CONTENT = {
    "fingerprint": "dict[str, str]",
    "session": "dict",
    "buffers": "dict[str, Tensor | None]",
    "trail": "str",
    "place": "list[int]",
    "seconds": "float",
    "done": "bool",
}


@dataclass(frozen=True)
class Checkpoint:
    """Where and how often `fit` saves its state.

    The state is saved after the first batch (so that a folder that cannot be written to, or a state
    that cannot be saved, shows at once), then at the given intervals, and at the end of every pass.
    An interval is counted from the end of a save, so that saving never takes most of the time.

    Attributes:
        directory: of one fit's checkpoint; made if it is not there.
        seconds: save when so many have gone by; None: not by time.
        batches: save when so many batches have been taken in; None: not by their number.
    """

    directory: str | os.PathLike[str]
    seconds: float | None = 60.0
    batches: int | None = None

    def check(self) -> None:
        """Raises ValueError for what makes no sense."""
        if self.seconds is not None and not self.seconds >= 0:
            raise ValueError(f"checkpoint: seconds must not be negative, found {self.seconds}")
        if self.batches is not None and self.batches < 1:
            raise ValueError(f"checkpoint: batches must be at least 1, found {self.batches}")
        if Path(self.directory).exists() and not Path(self.directory).is_dir():
            raise ValueError(
                f"checkpoint: {str(self.directory)!r} is a file, and must be a directory"
            )

    @property
    def path(self) -> Path:
        """The file."""
        return Path(self.directory) / FILE


class Checkpointed(Unkept):
    """Saves a session as it goes, or goes on from a saved one.

    Attributes:
        settings: where and how often.
        resume: go on from what is there.
        more: what else must be as it was when the checkpoint was made, in words.
    """

    def __init__(self, settings: Checkpoint, resume: bool, more: Mapping[str, str] = {}) -> None:
        self.settings, self.resume, self.more = settings, resume, more
        self.spent = 0.0
        self._trail = Trail()
        self._saved: dict[str, Any] | None = None

    def part(self, number: int) -> Checkpointed:
        """In a directory of its own, below that of all."""
        directory = Path(self.settings.directory) / f"sweep-{number + 1}"
        found = copy.copy(self)
        found.settings = replace(self.settings, directory=directory)
        return found

    def terms(self) -> dict[str, str]:
        return {
            "checkpoint": f"seconds={self.settings.seconds}, batches={self.settings.batches}",
            "resume": str(self.resume),
        }

    @contextmanager
    def open(self, session: Session) -> Iterator[None]:
        """Make the directory and claim it, and read the checkpoint that is to be resumed.

        Raises:
            ValueError: another fit is using the directory, or it has a checkpoint that is not to
                be resumed, or one of another fit, or damaged.
        """
        self._fingerprint = {**of_task(session), **self.more}
        self._since = self._start = time.monotonic()
        self._last = 0  # of the batches in this pass, when it was saved
        directory = Path(self.settings.directory)
        directory.mkdir(parents=True, exist_ok=True)
        with claimed(directory):
            path = self._found()
            if path is not None:
                if not self.resume:
                    raise ValueError(
                        f"checkpoint: {str(path)!r} is there already: pass resume=True to go on "
                        "from it (at once, if that fit has ended), or remove it"
                    )
                self._saved = self._opened(path, session)
            yield

    def _found(self) -> Path | None:
        """The checkpoint that is there."""
        return self.settings.path if self.settings.path.exists() else None

    def _write(self, content: dict[str, Any]) -> None:
        """Put it in the place of the one before."""
        write(self.settings.path, content)

    def _place(self) -> list[int]:
        """Where this rank is among others; a fit goes on by `_put`."""
        return []

    def _put(self, place: list[int]) -> None:
        pass

    def _opened(self, path: Path, session: Session) -> dict[str, Any]:
        content = read(path)
        try:
            check_all(content, _CONTENT)
        except ValueError as error:
            raise _forged(path, error) from error
        found = differences(content["fingerprint"], self._fingerprint)
        if found:
            shown = "; ".join(found[:4]) + ("; and more" if len(found) > 4 else "")
            raise ValueError(
                f"checkpoint: {str(path)!r} is of another fit: {shown}. Fit as then, or remove it "
                "to begin anew"
            )
        try:
            content["session"] = checked(content["session"], session)
            _check_buffers(session.task.model, content["buffers"])
            if min(content["seconds"], *content["place"], 0) < 0:
                raise ValueError("there is a negative number of seconds")
        except ValueError as error:
            raise _forged(path, error) from error
        return content

    def restored(self, session: Session, data: Iterable[Any]) -> bool:
        if self._saved is None:
            return False
        load(session, self._saved["session"])
        _restore_buffers(session.task.model, self._saved["buffers"])
        if not self._saved["done"]:
            return False
        batches = iter(data)
        taken = session.batches
        self.begun(session, batches)
        if next(batches, _END) is not _END:
            raise ValueError(_other_data(taken, "has more"))
        return True

    def begun(self, session: Session, batches: Iterator[Any]) -> None:
        saved, self._saved = self._saved, None
        self._trail, self.spent = Trail(), 0.0
        if saved is not None:
            self.spent = saved["seconds"]
            for number in range(session.batches):
                batch = next(batches, _END)
                if batch is _END:
                    raise ValueError(_other_data(session.batches, f"ends after {number}"))
                self._trail.add(batch)
            if self._trail.digest != saved["trail"]:
                raise ValueError(_other_data(session.batches, "has others"))
            self._put(saved["place"])
            self._since = time.monotonic()
        self._start, self._last = time.monotonic(), session.batches

    def saw(self, batch: Any) -> None:
        self._trail.add(batch)

    def due(self, session: Session, coming: int) -> bool:
        seconds, number = self.settings.seconds, self.settings.batches
        batches = session.batches + coming
        late = seconds is not None and time.monotonic() - self._since >= seconds
        many = number is not None and batches - self._last >= number
        return late or many or (batches == 1 and not session.passes)

    def save(self, session: Session) -> None:
        self._save(session, done=False)

    def after_pass(self, session: Session, batches: int, settled: bool) -> None:
        if not settled:
            self._trail = Trail()
            self._start, self.spent = time.monotonic(), 0.0
        self._save(session, done=settled, batches=batches)

    def _save(self, session: Session, *, done: bool, batches: int = 0) -> None:
        """Write it all down.

        Args:
            batches: in the data, where the fit is done, so that other data can be told.
        """
        state = state_of(session, written)
        content = {
            "fingerprint": self._fingerprint,
            "session": state | {"batches": batches} if done else state,
            "buffers": _buffers(session.task.model),
            "trail": self._trail.digest,
            "place": self._place(),
            "seconds": self.spent + time.monotonic() - self._start,
            "done": done,
        }
        self._write(content)
        self._since, self._last = time.monotonic(), session.batches


def _other_data(taken: int, how: str) -> str:
    return (
        f"the checkpoint had taken in {taken} batches of the pass, and data {how}: "
        "resume=True needs the same batches in the same order (DataLoader: shuffle=False, or a "
        "generator with the same seed; an iterator from its beginning)"
    )


def _forged(path: Path, error: ValueError) -> ValueError:
    return ValueError(
        f"checkpoint: {str(path)!r} does not hold what a fit saves: {error}. Remove it to begin "
        "anew"
    )


def _check_buffers(model: nn.Module, saved: Mapping[str, Any]) -> None:
    """Raise ValueError for a buffer of a module that the model does not have."""
    there = dict(model.named_modules(remove_duplicate=False))
    unknown = sorted({name.rpartition(".")[0] for name in saved} - there.keys())
    if unknown:
        raise ValueError(
            f"there is a module with a buffer {unknown[0]!r}, which this fit does not have"
        )


def _buffers(model: nn.Module) -> dict[str, Tensor | None]:
    """What forward passes may write to, replace or add."""
    return {
        part_name(prefix, name): None if buffer is None else written(buffer)
        for prefix, module in model.named_modules()
        for name, buffer in module._buffers.items()
    }


def _restore_buffers(model: nn.Module, saved: dict[str, Tensor | None]) -> None:
    """As in the fit that saved them; afterwards `buffers_kept` puts those of the user back."""
    for full, value in saved.items():
        prefix, _, name = full.rpartition(".")
        held = model.get_submodule(prefix)._buffers
        buffer = held.get(name)
        if buffer is None or value is None or buffer.shape != value.shape:
            held[name] = value
        else:
            put(value, buffer)
