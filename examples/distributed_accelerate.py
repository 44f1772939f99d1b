"""A fit with accelerate: accelerate launch --num_processes 2 examples/distributed_accelerate.py

`pip install accelerate`.
"""

from __future__ import annotations

import torch
from torch import distributed, nn
from torch.utils.data import DataLoader, TensorDataset

import kfoc


def main() -> None:
    from accelerate import Accelerator
    from accelerate.utils import DataLoaderConfiguration

    # Otherwise samples are repeated until all ranks have as many, and would count twice.
    even = DataLoaderConfiguration(even_batches=False)
    accelerator = Accelerator(dataloader_config=even)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 64), nn.Tanh(), nn.Linear(64, 5))
    data = TensorDataset(torch.randn(1000, 20), torch.randint(5, (1000,)))
    model, loader = accelerator.prepare(model, DataLoader(data, batch_size=64))

    group = distributed.group.WORLD if accelerator.num_processes > 1 else None
    curvature = kfoc.fit(model.eval(), loader, group=group)
    accelerator.print(curvature)
    accelerator.end_training()


if __name__ == "__main__":
    main()
