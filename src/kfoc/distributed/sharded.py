"""A curvature spread over the ranks of a group: each keeps, factorises and saves its own blocks.

Solving takes the cube of the factors' sizes in time, and its factorisations as much memory as the
factors; both are divided by the ranks, and what goes between them is the vector.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kfoc.common.ambient import Plain
from kfoc.curvature.curvature import Curvature, of_layers
from kfoc.curvature.damped import Dampings, check_layers
from kfoc.distributed import Ranks
from kfoc.files.index import read_index, saving, write_index
from kfoc.parameters.vectors import Vector

_INDEX = "sharded.json"


def owners(curvature: Curvature, world: int) -> dict[str, int]:
    """Layer name -> the rank that its block belongs to: the dearest first, each to whoever has
    least to do, by the `o^3 + i^3` of a factorisation."""
    costs = {name: sum(side**3 for side in b.shape) for name, b in curvature.items()}
    loads, found = [0] * world, {}
    for name in sorted(costs, key=lambda name: -costs[name]):
        rank = min(range(world), key=loads.__getitem__)
        loads[rank] += costs[name]
        found[name] = rank
    return {name: found[name] for name in curvature}


class ShardedCurvature(Plain):
    """This rank's blocks of a curvature that all ranks of a group have, or had.

    Every method is called by all ranks, with the same arguments, and gives all the same result.
    Keep no reference to the curvature that it was made of: this one holds the own blocks alone.

    Attributes:
        own: the curvature of this rank's blocks.
        owners: layer name -> rank.
    """

    def __init__(self, curvature: Curvature, group: Any) -> None:
        """
        Args:
            curvature: what `fit(..., group=group)` returned, or a loaded one, on every rank.
            group: a process group of `torch.distributed`, or a `Ranks`.
        """
        ranks = Ranks.of(group)
        if ranks is None:
            raise ValueError("group must be a torch.distributed process group, found None")
        self._ranks = ranks
        self.owners = owners(curvature, ranks.world)
        self._parameters = {
            name: layer for layer, names in curvature.parameters.items() for name in names
        }
        own = [layer for layer, rank in self.owners.items() if rank == ranks.rank]
        self.own = of_layers(curvature, own)

    def matvec(self, vector: Vector) -> dict[str, Tensor]:
        """`F v`, of all parameters."""
        return self._shared(vector, self.own.matvec)

    def solve(
        self, vector: Vector, damping: Dampings = 1e-3, *, scale: float = 1.0
    ) -> dict[str, Tensor]:
        """`(scale * F + damping * I)^-1 v`, of all parameters; damping as for `Curvature.solve`.

        Each rank factorises its own blocks alone; one all-reduce of the vector joins the parts.
        """
        mine = damping
        if isinstance(damping, Mapping):
            check_layers("damping", tuple(self.owners), damping)
            mine = {layer: damping[layer] for layer in self.own}
        return self._shared(vector, lambda v: self.own.solve(v, mine, scale=scale))

    def trace(self) -> float:
        """`tr F`."""
        return self._total(self.own.trace)

    def frobenius_norm(self) -> float:
        """`||F||_F`."""
        return self._total(lambda: self.own.frobenius_norm() ** 2) ** 0.5

    def logdet(self, damping: float = 1e-3, *, scale: float = 1.0) -> float:
        """`ln det (scale * F + damping * I)`."""
        return self._total(lambda: self.own.logdet(damping, scale=scale))

    def save(self, directory: str | os.PathLike[str], *, factorised: bool = False) -> None:
        """Write the own blocks to a file of this rank's in a directory that all share.

        A save over an older one takes its place when all ranks have written; until then that one
        stays.

        Args:
            factorised: as for `Curvature.save`.
        """
        ranks, folder = self._ranks, Path(directory)
        index, mine = folder / _INDEX, list[str]()
        with saving(index, mine), ranks.telling():
            folder.mkdir(parents=True, exist_ok=True)
            save = ranks.objects(uuid.uuid4().hex)[0]  # of all ranks, and of no other save
            mine.append(f"rank-{ranks.rank:05d}-of-{ranks.world:05d}-{save}.safetensors")
            self.own.save(folder / mine[0], factorised=factorised)
            files = ranks.objects(mine[0])
            if ranks.rank == 0:
                layers = {"layers": list(self.owners)}
                write_index(index, files, layers, "rank-*-of-*.safetensors")

    @staticmethod
    def load(
        directory: str | os.PathLike[str],
        device: str | torch.device = "cpu",
        *,
        mmap: bool = False,
    ) -> Curvature:
        """The whole curvature, from the files of all ranks, on any number of processes.

        Args:
            mmap: as for `Curvature.load`.

        Raises:
            FileNotFoundError: no save, or not the files of all ranks.
            ValueError: a file that is damaged, or of another save.
        """
        index = read_index(Path(directory) / _INDEX)
        files = [Path(directory) / name for name in index["files"]]
        parts = [Curvature.load(file, device=device, mmap=mmap) for file in files]
        layouts = {name: layout for part in parts for name, layout in part.layouts.items()}
        blocks = {name: block for part in parts for name, block in part.items()}
        order = index.get("layers", [])
        if sorted(order) != sorted(blocks):
            raise ValueError(f"{str(directory)!r} is damaged: it has {list(blocks)}, not {order}")
        return of_layers(replace(parts[0], blocks=blocks, layouts=layouts), order)

    def _shared(
        self, vector: Vector, operator: Callable[[Vector], dict[str, Tensor]]
    ) -> dict[str, Tensor]:
        if vector.keys() != self._parameters.keys():
            odd = sorted(vector.keys() ^ self._parameters.keys())
            raise ValueError(
                f"the vector must have exactly the curvature's parameters, differs in {odd}"
            )
        with self._ranks.telling():
            mine = {k: v for k, v in vector.items() if self._parameters[k] in self.own.blocks}
            found = operator(mine) if mine else {}
        # Zeros elsewhere: the sum over ranks has every rank's part as it is.
        parts = {
            name: found[name].contiguous() if name in found else torch.zeros_like(value)
            for name, value in vector.items()
        }
        self._ranks.sum(list(parts.values()))
        return parts

    def _total(self, part: Callable[[], float]) -> float:
        with self._ranks.telling():
            value = torch.tensor([part()], dtype=torch.float64)
        self._ranks.sum([value])
        return value.item()
