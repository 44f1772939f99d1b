"""Gloo processes on this machine: how tests start them, and how they find one another."""

from __future__ import annotations

import os
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import torch
from torch import distributed

import kfoc


def started(worker: str, world: int, directory: Path, limit: float) -> list[int]:
    """Run a file of this folder as so many ranks, to their ends; their exit codes.

    Args:
        limit: seconds for each.
    """
    here = Path(__file__).parent
    paths = [str(Path(kfoc.__file__).parents[1]), str(here)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, str(here / worker), str(rank), str(world), str(directory)],
            env=environment,
        )
        for rank in range(world)
    ]
    try:
        return [process.wait(limit) for process in processes]
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
            process.wait()


def joined(timeout: float) -> tuple[int, int, Path]:
    """In such a process: its rank, how many there are, and the directory; in their group.

    Args:
        timeout: seconds that a rank waits for another.
    """
    rank, world, directory = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    store = distributed.FileStore(str(directory / "store"), world)
    distributed.init_process_group(
        "gloo", store=store, rank=rank, world_size=world, timeout=timedelta(seconds=timeout)
    )
    return rank, world, directory
