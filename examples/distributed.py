"""A fit over several processes: torchrun --nproc-per-node 2 examples/distributed.py"""

from __future__ import annotations

import torch
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

import kfoc
from kfoc.distributed import Ranks


def main() -> None:
    on_gpu = torch.cuda.is_available()
    distributed.init_process_group("nccl" if on_gpu else "gloo")
    rank, world = distributed.get_rank(), distributed.get_world_size()
    device = torch.device("cuda", rank % torch.cuda.device_count()) if on_gpu else "cpu"
    if on_gpu:
        torch.cuda.set_device(device)

    torch.manual_seed(0)  # the same model and data on all ranks
    model = nn.Sequential(nn.Linear(20, 64), nn.Tanh(), nn.Linear(64, 5)).to(device)
    inputs, labels = torch.randn(1000, 20), torch.randint(5, (1000,))
    batches = list(zip(inputs.split(64), labels.split(64), strict=True))

    ranks = Ranks()
    curvature = kfoc.fit(
        DistributedDataParallel(model).eval(), batches[rank::world], probes=16, group=ranks
    )
    if rank == 0:
        print(curvature)
        print(f"{ranks.traffic.total_bytes / 1e6:.2f} MB put into collective operations by a rank")
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
