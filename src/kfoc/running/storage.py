"""Finished blocks in files, mapped to memory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from kfoc.blocks import Block

INDEX = "index.json"


class Files:
    """A directory with a file for each tensor, as it lies in memory, and an index of them.

    A file is mapped copy-on-write: what writes to a tensor in place leaves the file as it is. As a
    context, around the fit.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        self.made = False  # the directory
        self.index: dict[str, list[dict[str, Any]]] = {}
        self.written: list[Path] = []

    def __enter__(self) -> Files:
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
        return self

    def __exit__(self, kind: object, *error: object) -> None:
        """Write the index: layer -> file, shape and dtype of each tensor of its block.

        Where the fit has failed, remove what was written instead.
        """
        if kind is None:
            with self._new(self.directory / INDEX, "x") as file:
                json.dump({"version": 1, "layers": self.index}, file, indent=1)
            return
        for path in self.written:
            path.unlink(missing_ok=True)
        if self.made and next(self.directory.iterdir(), None) is None:
            self.directory.rmdir()

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
