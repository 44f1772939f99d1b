"""One pass over the data after the other: the way to run a fit that the others build on."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol

from kfoc.common.ambient import as_called
from kfoc.curvature.curvature import Curvature
from kfoc.fitting.marks import Mark
from kfoc.fitting.session import Session, Takes
from kfoc.fitting.task import Task, check_independent
from kfoc.model.batches import Present
from kfoc.running.progress import Meter, Report, length

_END = object()


class Runner(Protocol):
    """A way to run a task."""

    def run(self, task: Task, data: Iterable[Any], report: Report | None) -> Curvature:
        """The curvature; `report`, if there is one, gets a `Progress` after every batch."""


class Unkept:
    """What a checkpoint does for a fit, at its moments, where there is none: nothing."""

    spent = 0.0  # seconds of this pass before the fit went on from a checkpoint

    def part(self, number: int) -> Unkept:
        """That of one of several sessions, by its number from 0."""
        return self

    def terms(self) -> dict[str, str]:
        """What all ranks must have in common."""
        return {"checkpoint": "None"}

    def open(self, session: Session) -> AbstractContextManager[None]:
        """Around all passes of a new session."""
        return nullcontext()

    def restored(self, session: Session, data: Iterable[Any]) -> bool:
        """Put the session where the checkpoint was taken; True where it has seen all of the data.

        Raises:
            ValueError: the checkpoint is of a fit that had ended, of other data.
        """
        return False

    def begun(self, session: Session, batches: Iterator[Any]) -> None:
        """At the start of a pass, drop the batches that it had taken in before.

        Raises:
            ValueError: they are not what had been taken in.
        """

    def saw(self, batch: Any) -> None:
        """A batch that is about to be taken in."""

    def due(self, session: Session, coming: int) -> bool:
        """Whether it is time to save, once so many more batches have been taken in."""
        return False

    def save(self, session: Session) -> None:
        """Between two batches."""

    def after_pass(self, session: Session, batches: int, settled: bool) -> None:
        """A pass of so many batches has ended; `settled` where it was the last."""


class Alone:
    """What a fit asks of its ranks, see `Ranks`, where there are no others."""

    def check(self, session: Session, data: Iterable[Any], terms: dict[str, str]) -> Iterable[Any]:
        """The batches that have samples."""
        return Present(data)

    def start(self) -> None:
        """Begin a pass."""

    def take(self, session: Session, batch: Any, last: bool, keeper: Unkept) -> None:
        """Take in a batch. A data set of a single one gets that batch's optimum."""
        session.take(batch, alone=last and not session.batches)
        if not last and keeper.due(session, 0):
            keeper.save(session)

    def end(self, session: Session, keeper: Unkept) -> int:
        """The data of this pass have ended: the number of its samples."""
        return session.samples

    def union(self, names: set[str]) -> set[str]:
        """Names that any rank has."""
        return names


@dataclass
class Local:
    """Pass over the data until no layer needs it any more.

    Attributes:
        ranks: other processes, each with a share of the data.
        keeper: of a checkpoint.
    """

    ranks: Alone = field(default_factory=Alone)
    keeper: Unkept = field(default_factory=Unkept)

    def run(self, task: Task, data: Iterable[Any], report: Report | None) -> Curvature:
        return self.session(task, data, report).curvature()

    def session(
        self,
        task: Task,
        data: Iterable[Any],
        report: Report | None,
        takes: Takes | None = None,
        marks: list[Mark] | None = None,
        passes_before: int = 0,
    ) -> Session:
        """A session that has seen all of the data, as often as it needs; arguments as for it.

        Raises:
            ValueError: data that cannot be read as often.
        """
        session = Session(task, takes=takes, marks=marks, passes_before=passes_before)
        check_independent(session.selection.every.items())
        if task.estimator.pass_limit > 1 and isinstance(data, Iterator):
            raise ValueError(
                f"{task.estimator} needs several passes over the data, and an iterator can be read "
                "once: pass a list or a DataLoader"
            )
        data = self.ranks.check(session, data, self.keeper.terms())
        with self.keeper.open(session), session.watching():
            settled = self.keeper.restored(session, data)
            while not settled:
                settled = self._one_pass(session, data, report)
        return session

    def _one_pass(self, session: Session, data: Iterable[Any], report: Report | None) -> bool:
        """Take in all batches, or those that a checkpoint had not; whether it was the last pass."""
        batches = as_called(data)
        self.ranks.start()
        self.keeper.begun(session, batches)
        show = self._meter(session, data, report) if report else None
        batch = next(batches, _END)
        while batch is not _END:
            following = next(batches, _END)  # one ahead: to know which is the last
            last = following is _END
            self.keeper.saw(batch)
            self.ranks.take(session, batch, last, self.keeper)
            if show:
                show(session.batches, session.samples, last)
            batch = following
        samples, number = self.ranks.end(session, self.keeper), session.batches
        if not samples:
            raise ValueError(f"data has no batches (pass {session.earlier + 1})")
        session.check_pass()
        settled = session.end_pass(samples)
        self.keeper.after_pass(session, number, settled)
        return settled

    def _meter(
        self, session: Session, data: Iterable[Any], report: Report
    ) -> Callable[[int, int, bool], None]:
        changes = [layer.state.change() for layer in session.fitted.values() if layer.state]
        known = [change for change in changes if change is not None]
        batches = len(session.marks) if session.earlier else length(data)
        limit = session.earlier - session.passes + session.task.estimator.pass_limit
        meter = Meter(report, session.earlier + 1, limit, batches, max(known, default=None))
        meter.start -= self.keeper.spent
        return meter.show
