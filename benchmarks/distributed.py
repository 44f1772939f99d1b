"""Ranks x aggregation: agreement with one process, time, and bytes sent; then how near `online` and
`running` come to the optimum on short shards. Gloo, one CPU thread each.

python benchmarks/distributed.py
"""

from __future__ import annotations

import itertools
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
# Of the data sets in the second table.
SEEDS = 8
Data = list[tuple[torch.Tensor, torch.Tensor]]


def worker(rank: int, world: int, directory: str, short: bool) -> None:
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    store = distributed.FileStore(str(Path(directory, f"store-{world}-{short}")), world)
    distributed.init_process_group(
        "gloo", store=store, rank=rank, world_size=world, timeout=timedelta(minutes=5)
    )
    (short_shards if short else agreement)(rank, world)
    distributed.destroy_process_group()


def agreement(rank: int, world: int) -> None:
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


def short_shards(rank: int, world: int) -> None:
    """600 samples of a trained classifier in batches of 10, without a buffer; several of them."""
    for kind, aggregation in itertools.product(("in order", "sorted"), ("online", "running")):
        found = []
        for seed in range(SEEDS):
            model, batches = heavy_tailed(seed, kind == "sorted")
            share = -(-len(batches) // world)
            mine = batches[rank * share : (rank + 1) * share]
            estimator = kfoc.KFOC(aggregation, buffer=0)
            curvature = kfoc.fit(model, mine, estimator=estimator, fisher="exact", group=Ranks())
            if rank == 0:
                found += excesses(curvature, model, batches)
        if rank == 0:
            values = torch.tensor(found)
            row = f"{values.median():.4f} | {values.mean():.4f} | {values.max():.4f}"
            print(f"| {world} | {kind} | {aggregation} | {row} |", flush=True)


def heavy_tailed(seed: int, sort: bool) -> tuple[nn.Module, Data]:
    torch.manual_seed(seed)
    labels = torch.randint(4, (600,))
    labels = labels.sort().values if sort else labels
    inputs = torch.randn(4, 12)[labels] + 0.8 * torch.randn(600, 12)
    model = nn.Sequential(
        nn.Linear(12, 20), nn.ReLU(), nn.Linear(20, 16), nn.ReLU(), nn.Linear(16, 4)
    )
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(inputs), labels).backward()
        optimizer.step()
    return model, list(zip(inputs.split(10), labels.split(10), strict=True))


def excesses(curvature: kfoc.Curvature, model: nn.Module, data: Data) -> list[float]:
    """By how much the relative error of each layer exceeds the optimum's, by dense algebra."""
    exact = kfoc.fit(model, data, estimator=kfoc.BlockDiagonal(), fisher="exact")
    found = []
    for name, block in curvature.items():
        fisher, (o, i) = exact[name].to_dense(), block.shape
        rearranged = fisher.view(o, i, o, i).transpose(1, 2).reshape(o * o, i * i)
        best = torch.linalg.svdvals(rearranged)[1:].norm()
        found.append((((block.to_dense() - fisher).norm() - best) / fisher.norm()).item())
    return found


HEADS = {
    False: "| ranks | estimator | distance from one process (last layer) | time | sent by a rank |",
    True: "| ranks | data | aggregation | median excess | mean | largest |",
}


def main() -> None:
    for short, head in HEADS.items():
        print(head)
        print("|---" * (head.count("|") - 1) + "|", flush=True)
        with tempfile.TemporaryDirectory() as directory:
            for world in (1, 2, 4):
                multiprocessing.spawn(worker, (world, directory, short), nprocs=world)
        print()


if __name__ == "__main__":
    main()
