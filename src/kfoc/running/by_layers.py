"""Layers in groups that fit a budget of memory, and finished blocks in files mapped to memory."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import torch
from torch import Tensor

from kfoc.blocks import Block
from kfoc.errors import Footprint
from kfoc.running.marks import Mark

INDEX = "index.json"


class Files:
    """A directory with a file for each tensor, as it lies in memory, and an index of them.

    A file is mapped copy-on-write: what writes to a tensor in place leaves the file as it is.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        self.made = False  # the directory
        self.index: dict[str, list[dict[str, Any]]] = {}
        self.written: list[Path] = []

    def open(self) -> None:
        """Make the directory.

        Raises:
            ValueError: there is something in it.
            FileNotFoundError: the folder that it is to be in does not exist.
        """
        place = str(self.directory)
        if not self.directory.exists():
            if not self.directory.parent.is_dir():
                raise FileNotFoundError(f"there is no folder to make storage={place!r} in")
            self.directory.mkdir()
            self.made = True
        elif not self.directory.is_dir():
            raise ValueError(f"storage={place!r} is a file: name a new or empty directory")
        elif next(self.directory.iterdir(), None) is not None:
            raise ValueError(
                f"storage={place!r} is not empty, and nothing in it is written over: name a new or "
                "empty directory"
            )

    def put(self, layer: str, block: Block) -> Block:
        """The block with its tensors in files; on the CPU, wherever it was."""
        number, entries = len(self.index), self.index.setdefault(layer, [])

        def moved(tensor: Tensor) -> Tensor:
            file = self.directory / f"{number:05d}-{len(entries):03d}.bin"
            dtype = str(tensor.dtype).removeprefix("torch.")
            entries.append({"file": file.name, "shape": list(tensor.shape), "dtype": dtype})
            return self._mapped(tensor, file)

        return block.mapped(moved)

    def _new(self, file: Path, mode: str) -> IO[Any]:
        """A file of this fit's own: those of another are neither written over nor removed."""
        try:
            opened = open(file, mode)  # noqa: SIM115  (the caller's)
        except FileExistsError:
            raise ValueError(
                f"storage={str(self.directory)!r} has got a {file.name!r} from elsewhere (from "
                "another fit?): name a directory that is this fit's alone"
            ) from None
        self.written.append(file)
        return opened

    def _mapped(self, tensor: Tensor, file: Path) -> Tensor:
        whole = tensor.detach().cpu().contiguous()
        # Not through a mapping, whose pages would count as the process's own.
        with self._new(file, "xb") as opened:
            whole.numpy().tofile(opened)
        if not whole.numel():  # nothing to map
            return whole
        flat = torch.from_file(str(file), shared=False, size=whole.numel(), dtype=whole.dtype)
        return flat.view(whole.shape)

    def close(self) -> None:
        """Write the index: layer -> file, shape and dtype of each tensor of its block."""
        with self._new(self.directory / INDEX, "x") as file:
            json.dump({"version": 1, "layers": self.index}, file, indent=1)

    def remove(self) -> None:
        """Remove what was written, and the directory where it was made for that."""
        for path in self.written:
            path.unlink(missing_ok=True)
        if self.made and next(self.directory.iterdir(), None) is None:
            self.directory.rmdir()


@dataclass
class Sweeps:
    """The sweeps over the data, each of which fits as many layers as the budget has room for.

    A layer is taken when a sweep first meets it and there is room for its state, for the largest
    block of the sweep (made while the states are still there), and for the finished blocks that
    are kept in memory; otherwise it waits for a sweep to come. As a context: where the fit fails,
    the files that it wrote are removed.

    Attributes:
        budget: bytes; None: no limit.
        files: where finished blocks go; None: they stay in memory.
        rereadable: whether there can be several sweeps.
        blocks: that are finished, by layer.
        passes: over the data in all sweeps that are over.
        marks: of the batches in the first pass.
        taken: the layers of this sweep.
        waiting: layers met in this sweep that are fitted in a later one.
        promised: layer -> bytes of its finished block, as estimated.
    """

    budget: int | None
    files: Files | None
    rereadable: bool
    blocks: dict[str, Block] = field(default_factory=dict)
    passes: int = 0
    marks: list[Mark] = field(default_factory=list)
    taken: dict[str, Footprint] = field(default_factory=dict)
    waiting: set[str] = field(default_factory=set)
    promised: dict[str, int] = field(default_factory=dict)

    @staticmethod
    def within(
        budget: int | None, storage: str | Path | None, *, rereadable: bool
    ) -> Sweeps | None:
        """None where neither is given.

        Raises:
            ValueError: a budget that is no positive number.
        """
        if budget is None and storage is None:
            return None
        if budget is not None and (type(budget) is not int or budget < 1):
            raise ValueError(f"memory_budget must be a positive number of bytes, found {budget!r}")
        return Sweeps(budget, None if storage is None else Files(storage), rereadable)

    def __enter__(self) -> Sweeps:
        if self.files:
            self.files.open()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.files and kind is not None:
            self.files.remove()

    def takes(self, layer: str, estimate: Callable[[], Footprint]) -> bool:
        """Whether this sweep, which meets the layer for the first time, fits it.

        Raises:
            ValueError: no sweep can, or another sweep would be needed and cannot be had.
        """
        if layer in self.blocks:
            return False
        if self.budget is None:
            return True
        footprint = estimate()
        self.promised[layer] = footprint.block
        self._check_blocks()
        room = self.budget - self._kept()
        if _needed([*self.taken.values(), footprint]) <= room:
            self.taken[layer] = footprint
            return True
        if not self.taken or _needed([footprint]) > room:
            self._refuse(layer, footprint, room)
        if not self.rereadable:
            raise ValueError(
                f"layer {layer!r} exceeds memory_budget={self.budget} together with "
                f"{len(self.taken)} others, so that several sweeps over the data are needed, and "
                "an iterator can be read once: pass a list or a DataLoader, or a larger budget"
            )
        self.waiting.add(layer)
        return False

    def _kept(self) -> int:
        """Bytes of the finished blocks in memory."""
        if self.files:
            return 0
        return sum(tensor.nbytes for block in self.blocks.values() for tensor in block.tensors())

    def _check_blocks(self) -> None:
        total = sum(self.promised.values())
        if self.files or self.budget is None or total <= self.budget:
            return
        largest = sorted(self.promised, key=lambda name: -self.promised[name])[:3]
        layers = ", ".join(f"{name!r} {self.promised[name]}" for name in largest)
        raise ValueError(
            f"the finished blocks of {len(self.promised)} layers alone take {total} bytes (the "
            f"largest: {layers}), more than memory_budget={self.budget}: pass storage=... (a "
            "directory) to keep them in files, a larger budget, or fewer layers by layers=..."
        )

    def _refuse(self, layer: str, footprint: Footprint, room: int) -> None:
        beside = f", of which finished blocks hold {self._kept()}" if self._kept() else ""
        raise ValueError(
            f"layer {layer!r} takes {footprint.state} bytes while it is fitted and "
            f"{footprint.block} for its block, more than memory_budget={self.budget}{beside}: pass "
            "a larger budget, storage=... (a directory) for the finished blocks, a smaller buffer "
            "of kfoc.KFOC, or leave the layer out by layers=..."
        )

    def kept(self, layer: str, block: Block) -> Block:
        """The finished block, as it is to be kept."""
        return self.files.put(layer, block) if self.files else block

    def over(self, passes: int, marks: list[Mark]) -> bool:
        """End a sweep of so many passes; True where it was the last.

        Raises:
            ValueError: it did not meet the layers that the one before it met.
        """
        self.passes, self.marks = self.passes + passes, marks
        missing = self.promised.keys() - self.blocks.keys() - self.waiting
        if missing:
            raise ValueError(
                f"layer {min(missing)!r} was called in the first sweep over the data, and not in "
                "a later one: the model must call the same layers on every sweep"
            )
        if not self.waiting:
            if self.files:
                self.files.close()
            return True
        self.taken, self.waiting = {}, set()
        return False


def _needed(footprints: list[Footprint]) -> int:
    """Bytes at most, when the first of the blocks is made beside all states."""
    states = sum(max(each) for each in footprints)  # a block takes the place of its state
    return states + max(each.block for each in footprints)
