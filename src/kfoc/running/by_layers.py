"""Layers in groups that fit a budget of memory, each with sweeps of its own over the data."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any

from kfoc.blocks import Block
from kfoc.curvature.curvature import Curvature, of_layers
from kfoc.errors import Footprint
from kfoc.fitting.layer_fit import LayerFit
from kfoc.fitting.marks import Mark
from kfoc.fitting.session import Session
from kfoc.fitting.task import Task
from kfoc.parameters.layout import Layout
from kfoc.running.local import Local
from kfoc.running.progress import Report
from kfoc.running.storage import Files
from kfoc.samples.base import LayerSamples


@dataclass
class ByLayers:
    """One session after the other, each of which fits as many layers as the budget has room for.

    A layer is taken when a session first meets it and there is room for its state, for the largest
    block of the session (made while the states are still there), and for the finished blocks that
    are kept in memory; otherwise it waits for a session to come.

    Attributes:
        budget: bytes; None: no limit.
        files: where finished blocks go; None: they stay in memory.
        local: runs the sessions.
    """

    budget: int | None
    files: Files | None
    local: Local

    def run(self, task: Task, data: Iterable[Any], report: Report | None) -> Curvature:
        """The curvature of the layers of all sessions.

        Raises:
            ValueError: no session has room for a layer, or another one would be needed and cannot
                be had, or does not meet the layers that the one before it met.
        """
        sweeps = _Sweeps(self, rereadable=not isinstance(data, Iterator))
        with ExitStack() as stack:
            if self.files:
                stack.enter_context(self.files)
            while True:
                number = sweeps.number
                local = replace(self.local, keeper=self.local.keeper.part(number))
                marks, before = sweeps.marks, sweeps.passes
                session = local.session(task, data, report, sweeps.takes, marks, before)
                waiting = local.ranks.union(sweeps.waiting(session))
                elsewhere = waiting | sweeps.blocks.keys()
                put = self.files.put if self.files else None
                curvature = session.curvature(put, elsewhere)
                sweeps.take(session, curvature, waiting)
                if not waiting:
                    return sweeps.joined(session, curvature)


@dataclass
class _Sweeps:
    """What the sessions so far have come to.

    Attributes:
        rereadable: whether there can be several.
        blocks, layouts: of the layers that are finished.
        met: every layer that was met so far.
        marks: of the batches in the first pass of all.
        passes: over the data, of all sessions that are over.
        number: of those.
    """

    by: ByLayers
    rereadable: bool
    blocks: dict[str, Block] = field(default_factory=dict)
    layouts: dict[str, Layout] = field(default_factory=dict)
    met: set[str] = field(default_factory=set)
    marks: list[Mark] = field(default_factory=list)
    passes: int = 0
    number: int = 0

    def takes(self, session: Session, layer: LayerFit, samples: LayerSamples) -> bool:
        """Whether this session, which meets the layer for the first time, fits it."""
        if layer.name in self.blocks:
            return False
        budget = self.by.budget
        if budget is None:
            return True
        layer.measure(session.task, session.estimator, samples)
        each = {n: f.footprint for n, f in [*session.layers.items(), (layer.name, layer)]}
        known = {name: footprint for name, footprint in each.items() if footprint is not None}
        own = known[layer.name]
        self._check_blocks({name: footprint.block for name, footprint in known.items()})
        room = budget - self._kept()
        taken = [known[name] for name in session.fitted]
        if _needed([*taken, own]) <= room:
            return True
        if not taken or _needed([own]) > room:
            self._refuse(layer.name, own, room)
        if not self.rereadable:
            raise ValueError(
                f"layer {layer.name!r} exceeds memory_budget={budget} together with {len(taken)} "
                "others, so that several sweeps over the data are needed, and an iterator can be "
                "read once: pass a list or a DataLoader, or a larger budget"
            )
        return False

    def waiting(self, session: Session) -> set[str]:
        """The layers that are left to sessions to come."""
        return session.layers.keys() - session.fitted.keys() - self.blocks.keys()

    def take(self, session: Session, curvature: Curvature, waiting: set[str]) -> None:
        """Keep what a session has come to."""
        self.blocks |= curvature.blocks
        self.layouts |= curvature.layouts
        self.passes, self.number = session.earlier, self.number + 1
        missing = self.met - self.blocks.keys() - waiting
        if missing:
            raise ValueError(
                f"layer {min(missing)!r} was called in the first sweep over the data, and not in "
                "a later one: the model must call the same layers on every sweep"
            )
        self.met |= session.layers.keys() | waiting

    def joined(self, session: Session, last: Curvature) -> Curvature:
        """One curvature of all, in the order of the model."""
        names = [name for name in session.selection.blocks if name in self.blocks]
        return of_layers(replace(last, blocks=self.blocks, layouts=self.layouts), names)

    def _kept(self) -> int:
        """Bytes of the finished blocks in memory."""
        if self.by.files:
            return 0
        return sum(tensor.nbytes for block in self.blocks.values() for tensor in block.tensors())

    def _check_blocks(self, promised: dict[str, int]) -> None:
        total = sum(promised.values())
        if self.by.files or self.by.budget is None or total <= self.by.budget:
            return
        largest = sorted(promised, key=lambda name: -promised[name])[:3]
        layers = ", ".join(f"{name!r} {promised[name]}" for name in largest)
        raise ValueError(
            f"the finished blocks of {len(promised)} layers alone take {total} bytes (the "
            f"largest: {layers}), more than memory_budget={self.by.budget}: pass storage=... (a "
            "directory) to keep them in files, a larger budget, or fewer layers by layers=..."
        )

    def _refuse(self, layer: str, footprint: Footprint, room: int) -> None:
        kept, budget = self._kept(), self.by.budget
        beside = f", of which finished blocks hold {kept}" if kept else ""
        raise ValueError(
            f"layer {layer!r} takes {footprint.state} bytes while it is fitted and "
            f"{footprint.block} for its block, more than memory_budget={budget}{beside}: pass a "
            "larger budget, storage=... (a directory) for the finished blocks, a smaller buffer "
            "of kfoc.KFOC, or leave the layer out by layers=..."
        )


def _needed(footprints: list[Footprint]) -> int:
    """Bytes at most, when the first of the blocks is made beside all states."""
    states = sum(max(each) for each in footprints)  # a block takes the place of its state
    return states + max(each.block for each in footprints)
