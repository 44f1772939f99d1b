"""One rank of a group that fits the cases of a file, in order.

    python onepass_worker.py RANK WORLD DIRECTORY

Reads DIRECTORY/cases.pt, and writes DIRECTORY/factors-RANK.pt: layer -> factors, by case.
`over_ranks` starts them all.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import Tensor, distributed

import kfoc
from hard_streams import Case, factors
from ranks import joined, started

TIMEOUT = 120.0  # seconds that a rank waits for another


def over_ranks(cases: Sequence[Case], world: int, limit: float) -> list[list[float]]:
    """The excesses of every case over so many processes, by layer.

    Args:
        limit: seconds for all of them.

    Raises:
        AssertionError: a rank failed, or has other numbers than another.
    """
    with tempfile.TemporaryDirectory() as directory:
        torch.save([asdict(case) for case in cases], Path(directory) / "cases.pt")
        codes = started("onepass_worker.py", world, Path(directory), limit)
        assert not any(codes), f"exit codes {codes}"
        found = [torch.load(Path(directory) / f"factors-{rank}.pt") for rank in range(world)]
    for other in found[1:]:
        for mine, theirs in zip(found[0], other, strict=True):
            for layer, pair in mine.items():
                assert all(map(torch.equal, pair, theirs[layer])), f"ranks differ in {layer!r}"
    return [case.judged(each) for case, each in zip(cases, found[0], strict=True)]


def main() -> None:
    rank, world, directory = joined(TIMEOUT)
    found: list[dict[str, tuple[Tensor, Tensor]]] = []
    for fields in torch.load(directory / "cases.pt"):
        case = replace(Case(**fields), world=world)
        model, data = case.problem.model, case.shard(rank)
        curvature = kfoc.fit(model, data, group=distributed.group.WORLD, **case.options())
        assert curvature.num_samples == case.samples
        found.append({layer: factors(block) for layer, block in curvature.items()})
    torch.save(found, directory / f"factors-{rank}.pt")
    distributed.barrier()


if __name__ == "__main__":
    main()
    os._exit(0)  # a group whose other ranks are gone may abort where it says goodbye
