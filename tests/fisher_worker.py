"""One rank of tests/fisher/test_ranks.py: python fisher_worker.py RANK WORLD DIRECTORY

Writes DIRECTORY/found-RANK.pt.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import distributed, nn

import kfoc
from kfoc.distributed import RanksError
from models import batches
from ranks import joined


def problem() -> tuple[nn.Sequential, list[Any], dict[str, torch.Tensor]]:
    """A model, 13 samples in batches of 4, and three vectors."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    data = batches(torch.randn(13, 4), torch.randint(3, (13,)), 4)
    return model, data, {name: torch.randn(3, *p.shape) for name, p in model.named_parameters()}


def told(function: Any, *args: Any, **options: Any) -> str:
    try:
        function(*args, **options)
    except (RanksError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def main() -> None:
    rank, _, directory = joined(60.0)
    model, data, v = problem()
    group: dict[str, Any] = {"group": distributed.group.WORLD}
    own = data[:3] if rank == 0 else data[3:]
    fisher = kfoc.Fisher(model, own, **group)
    curvature = kfoc.fit(model, own, fisher="exact", **group)
    found: dict[str, Any] = {
        "product": fisher.matvec(v),
        "form": fisher.quadratic_form(v),
        "samples": fisher.num_samples,
        "solution": fisher.solve(v, preconditioner=curvature, rtol=1e-8).vector,
        # All samples are the first rank's.
        "alone": kfoc.Fisher(model, data if rank == 0 else [], **group).matvec(v),
        "none": told(kfoc.Fisher(model, [], **group).matvec, v),
    }
    other = {name: part * (1 + rank) for name, part in v.items()}
    found["other vectors"] = told(kfoc.Fisher(model, own, **group).matvec, other)
    bad = own if rank == 0 else [(torch.full((2, 4), float("nan")), None)]
    found["bad data"] = told(kfoc.Fisher(model, bad, **group).solve, v)
    torch.save(found, directory / f"found-{rank}.pt")
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
