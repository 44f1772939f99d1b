"""One rank of a group that fits the cases of a file, in order.

    python onepass_worker.py RANK WORLD DIRECTORY

Reads DIRECTORY/cases.pt, and writes DIRECTORY/factors-RANK.pt: layer -> factors, by case.
`over_ranks` starts them all.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, replace
from datetime import timedelta
from pathlib import Path

import torch
from torch import Tensor, distributed

import kfoc
from hard_streams import Case, factors

TIMEOUT = 120.0  # seconds that a rank waits for another


def over_ranks(cases: Sequence[Case], world: int, limit: float) -> list[list[float]]:
    """The excesses of every case over so many processes, by layer.

    Args:
        limit: seconds for all of them.

    Raises:
        AssertionError: a rank failed, or has other numbers than another.
    """
    here = Path(__file__)
    paths = [str(Path(kfoc.__file__).parents[1]), str(here.parent)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as directory:
        torch.save([asdict(case) for case in cases], Path(directory) / "cases.pt")
        processes = [
            subprocess.Popen(
                [sys.executable, str(here), str(rank), str(world), directory], env=environment
            )
            for rank in range(world)
        ]
        try:
            codes = [process.wait(limit) for process in processes]
        finally:
            for process in processes:
                if process.poll() is None:
                    process.kill()
                process.wait()
        assert not any(codes), f"exit codes {codes}"
        found = [torch.load(Path(directory) / f"factors-{rank}.pt") for rank in range(world)]
    for other in found[1:]:
        for mine, theirs in zip(found[0], other, strict=True):
            for layer, pair in mine.items():
                assert all(map(torch.equal, pair, theirs[layer])), f"ranks differ in {layer!r}"
    return [case.judged(each) for case, each in zip(cases, found[0], strict=True)]


def main() -> None:
    rank, world, directory = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    store = distributed.FileStore(str(directory / "store"), world)
    distributed.init_process_group(
        "gloo", store=store, rank=rank, world_size=world, timeout=timedelta(seconds=TIMEOUT)
    )
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
