"""Checkpointed and compiled models: exact, or refused with the reason."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import kfoc
from every_layer import check_every_block

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


class Checkpointed(nn.Module):
    """Layers, a loose parameter and attention within checkpointed regions."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.first, self.inner, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.scale = nn.Parameter(torch.randn(1, 1, 4))
        self.reentrant = reentrant

    def region(self, x: Tensor) -> Tensor:
        x = x + torch.tanh(self.inner(torch.sin(x * self.scale.exp())))
        return x + self.attention(x, x, x, need_weights=False)[0]

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.first(x))
        x = checkpoint(self.region, x, use_reentrant=self.reentrant)
        x = checkpoint(self.region, x, use_reentrant=self.reentrant)
        return self.head(x[:, 0])


def test_checkpointed_regions_are_exact() -> None:
    model = Checkpointed(False)
    found = check_every_block(model, torch.randn(5, 3, 4))
    assert found.layouts[""].kind == "flat"
    assert len(found) == 6


def test_checkpointed_regions_of_several_directions() -> None:
    model, x = Checkpointed(False), torch.randn(5, 3, 4)
    plain = Checkpointed(False)
    plain.load_state_dict(model.state_dict())
    plain.forward = lambda x: plain.head(  # type: ignore[method-assign]
        plain.region(plain.region(torch.tanh(plain.first(x))))[:, 0]
    )
    options: dict = {"fisher": "exact", "estimator": kfoc.KFOC("exact", buffer=0, rtol=1e-3)}
    data = [(part, None) for part in x.split(2)]
    first, second = (kfoc.fit(m, data, **options) for m in (model, plain))
    for layer in first:
        torch.testing.assert_close(first[layer].to_dense(), second[layer].to_dense())


def test_reentrant_checkpoints_are_refused_with_the_way_out() -> None:
    model, x = Checkpointed(True), torch.randn(5, 3, 4)
    with pytest.raises(ValueError, match="pass use_reentrant=False"):
        kfoc.fit(model, [(x, None)], "gaussian")


class Body(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.scale = nn.Parameter(torch.randn(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)) * self.scale)


def whole(model: nn.Module, backend: str) -> nn.Module:
    return torch.compile(model, backend=backend)  # type: ignore[return-value]


def part(model: nn.Module, backend: str) -> nn.Module:
    model[0] = torch.compile(model[0], backend=backend)  # type: ignore[operator]
    return model


def in_place(model: nn.Module, backend: str) -> nn.Module:
    model.compile(backend=backend)
    return model


@pytest.mark.parametrize("warm", [False, True], ids=["new", "run before"])
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("how", [whole, part, in_place])
def test_compiled_models_are_exact(
    how: Callable[[nn.Module, str], nn.Module], backend: str, warm: bool
) -> None:
    torch.compiler.reset()
    model, x = nn.Sequential(Body(), nn.Tanh(), nn.Linear(4, 2)), torch.randn(5, 4)
    expected = kfoc.fit(model, [(x, None)], "gaussian", fisher="exact")
    compiled = how(model, backend)
    if warm:
        compiled(x).sum().backward()
        compiled.zero_grad()
    found = kfoc.fit(compiled, [(x, None)], "gaussian", fisher="exact")
    assert set(found) <= {name for name, _ in compiled.named_modules()}
    names = {name for each in found.parameters.values() for name in each}
    assert names == {name for name, _ in compiled.named_parameters()}
    for name, block in found.items():
        same = expected[name.replace("_orig_mod.", "").replace("._orig_mod", "")]
        torch.testing.assert_close(block.to_dense(), same.to_dense(), rtol=0, atol=0)
    compiled(x)
    torch.compiler.reset()
