"""A way to run a fit of one's own, in a file of its own: docs/design.md shows it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import kfoc
from kfoc.fitting.session import Session
from kfoc.fitting.task import Task
from kfoc.running.progress import Report


@dataclass(frozen=True)
class UntilSteady:
    """A pass that ends when a batch has changed the trace by less than this share."""

    share: float

    def run(self, task: Task, data: Iterable[Any], report: Report | None) -> kfoc.Curvature:
        session, before = Session(task), 0.0
        with session.watching():
            for batch in data:
                session.take(batch)
                trace = session.snapshot(session.samples).trace()
                if abs(trace - before) <= self.share * trace:
                    break
                before = trace
            session.end_pass(session.samples)
        return session.curvature()
