"""Models whose outputs depend on the other samples have no derivatives sample by sample."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import kfoc

ACROSS: dict[str, Callable[[Tensor], Tensor]] = {
    "attention": lambda h: torch.softmax(h @ h.mT, -1) @ h,
    "graph": lambda h: (h + h.roll(1, 0)) / 2,
    "centred": lambda h: h - h.mean(0),
    "running sum": lambda h: h.cumsum(0),
    "of the size": lambda h: h / len(h),
    "a little": lambda h: h + 0.01 * h.roll(1, 0),
    "chance": lambda h: nn.functional.dropout(h, 0.5),
}


class Across(nn.Module):
    def __init__(self, across: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.layer, self.head, self.across = nn.Linear(4, 5), nn.Linear(5, 3), across

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.across(torch.tanh(self.layer(x))))


def jobs(model: nn.Module) -> list[Callable[[], object]]:
    torch.manual_seed(0)
    x, y = torch.randn(9, 4), torch.randint(3, (9,))
    curvature = kfoc.fit(model, [(x, y)])
    laplace = kfoc.Laplace(model, curvature)
    return [
        lambda: kfoc.influence(model, curvature, [(x, y)], (x[:1], y[:1])),
        lambda: kfoc.influence(model, curvature, [(x[:1], y[:1])], (x, y)),
        lambda: laplace.linearised(x, chunk_size=1),
        lambda: laplace.probabilities(x),
        lambda: laplace.tuned_by_validation([(x, y)], (1.0,)),
    ]


@pytest.mark.parametrize("across", ACROSS)
def test_batches_that_are_not_of_independent_samples(across: str) -> None:
    for job in jobs(Across(ACROSS[across])):
        with pytest.raises(ValueError, match="has other outputs beside other samples"):
            job()


@pytest.mark.filterwarnings("ignore:with the best prior precision")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_independent_samples(dtype: torch.dtype) -> None:
    model = Across(lambda h: h).to(dtype)

    class Cast(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, x: Tensor) -> Tensor:
            return self.model(x.to(dtype))

    for job in jobs(Cast()):
        job()
