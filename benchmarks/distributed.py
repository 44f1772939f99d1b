"""Ranks x aggregation: agreement with one process, time, and bytes sent. Gloo, one CPU thread each.

python benchmarks/distributed.py
"""

from __future__ import annotations

import sys
import tempfile
import time
from datetime import timedelta
from pathlib import Path

import torch
from torch import distributed, multiprocessing, nn

import kfoc
from kfoc.distributed import Ranks

ESTIMATORS: dict[str, kfoc.Estimator] = {
    "KFAC": kfoc.KFAC(),
    "Diagonal": kfoc.Diagonal(),
    "exact": kfoc.KFOC("exact", rtol=1e-12, passes=100),
    "exact, no buffer": kfoc.KFOC("exact", rtol=1e-12, passes=100, buffer=0),
    "online": kfoc.KFOC(),
    "online, no buffer": kfoc.KFOC(buffer=0),
    "running": kfoc.KFOC("running"),
    "approx": kfoc.KFOC("approx"),
}


def worker(rank: int, world: int, directory: str) -> None:
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    store = distributed.FileStore(str(Path(directory, f"store-{world}")), world)
    distributed.init_process_group(
        "gloo", store=store, rank=rank, world_size=world, timeout=timedelta(minutes=5)
    )
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 10))
    inputs, labels = torch.randn(4000, 64), torch.randint(10, (4000,))
    batches = list(zip(inputs.split(100), labels.split(100), strict=True))
    for name, estimator in ESTIMATORS.items():
        ranks = Ranks()
        distributed.barrier()
        started = time.perf_counter()
        curvature = kfoc.fit(model, batches[rank::world], estimator=estimator, group=ranks)
        seconds = time.perf_counter() - started
        if rank == 0:
            alone = kfoc.fit(model, batches, estimator=estimator)
            pairs = [(curvature[k].to_dense(), alone[k].to_dense()) for k in ("2",)]
            apart = max(((a - b).norm() / b.norm()).item() for a, b in pairs)
            sent = ranks.traffic.total_bytes / 1e6
            print(f"| {world} | {name} | {apart:.1e} | {seconds:.2f} s | {sent:.2f} MB |")
            sys.stdout.flush()
        distributed.barrier()
    distributed.destroy_process_group()


def main() -> None:
    print(
        "| ranks | estimator | distance from one process (last layer) | time | put in by a rank |"
    )
    print("|---|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as directory:
        for world in (1, 2, 4):
            multiprocessing.spawn(worker, (world, directory), nprocs=world)


if __name__ == "__main__":
    main()
