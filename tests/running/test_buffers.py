"""Whatever runs the model leaves its buffers as they were, in train and in eval mode."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import kfoc
from models import batches
from test_checkpoint import StopError, cut, same


class Changing(nn.Module):
    """A layer with buffers that are written to, replaced, filled and added by the forward pass."""

    counter: Tensor
    mean: Tensor
    table: Tensor
    silent: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("counter", torch.zeros(()))
        self.register_buffer("mean", torch.zeros(3))
        self.register_buffer("table", torch.ones(2), persistent=False)
        self.register_buffer("silent", torch.zeros(()))
        self.register_buffer("none", None)
        self.longest = 2

    def forward(self, x: Tensor) -> Tensor:
        self.counter += 1
        self.mean = self.mean + x.detach().mean(0)
        if self.longest < 10:  # as tables of positions grow
            self.longest = 10
            self.register_buffer("table", torch.ones(10), persistent=False)
            self.register_buffer("new", torch.ones(1), persistent=False)
        self.none = x.detach()
        self.count_silently()
        return x * self.table[0]

    def count_silently(self) -> None:
        self.silent.numpy()[()] += 1  # no version counts it, as none counts those of batch_norm


class Fading(nn.Module):
    """Whose outputs depend on how often it was called, by a buffer that is replaced."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scales", torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        self.scales = torch.cat([self.scales, self.scales[-1:] / 2])
        return x * self.scales.sum()


def changing() -> tuple[nn.Module, list]:
    model = nn.Sequential(
        nn.Linear(4, 3), Changing(), nn.Unflatten(1, (1, 3)),
        nn.InstanceNorm1d(1, track_running_stats=True),  # whose kernel counts no versions
        nn.Flatten(), nn.Linear(3, 2),
    )  # fmt: skip
    return model.eval(), batches(torch.randn(6, 4), torch.randint(2, (6,)), 3)


def everything(model: nn.Module) -> list:
    return [
        (name, buffer if buffer is None else (id(buffer), buffer.tolist()), sorted(module.__dict__))
        for module in model.modules()
        for name, buffer in module._buffers.items()
    ] + [model[1].longest, sorted(model[1]._non_persistent_buffers_set)]


def observe(model: nn.Module, data: list, path: Path) -> None:
    optimizer = kfoc.NaturalGradient(model)
    optimizer.observe(data[0][0])


def track(model: nn.Module, data: list, path: Path) -> None:
    tracker = kfoc.Tracker(model)
    for batch in data:
        tracker.update(*batch)


def estimate(model: nn.Module, data: list, path: Path) -> kfoc.Curvature:
    return kfoc.fit(model, data)


def resume(model: nn.Module, data: list, path: Path) -> None:
    for _ in range(2):
        kfoc.fit(model, data, checkpoint=path, resume=True)


def fail(model: nn.Module, data: list, path: Path) -> None:
    with pytest.raises(ValueError, match="finite"):
        kfoc.fit(model, [*data, (data[0][0] * torch.nan, data[0][1])])


def influence(model: nn.Module, data: list, path: Path) -> None:
    kfoc.influence(model, estimate(model, data, path), data, data[0])


def laplace(model: nn.Module, data: list, path: Path) -> None:
    posterior = kfoc.Laplace(model, estimate(model, data, path))
    posterior.sampled_outputs(data[0][0], 2)
    posterior.linearised(data[0][0])
    posterior.data_fit(data)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("use", [estimate, resume, fail, track, observe, influence, laplace])
def test_buffers_come_back(
    use: Callable[[nn.Module, list, Path], object], training: bool, tmp_path: Path
) -> None:
    model, data = changing()
    model[1].train(training)
    model[3].train(training)
    before = everything(model)
    use(model, data, tmp_path)
    assert everything(model) == before


def test_a_graph_that_waits_for_its_backward_pass_is_not_disturbed() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)).train()
    model[1].eval()
    model[1].register_buffer("mask", torch.ones(3))
    model[1].register_forward_hook(lambda module, inputs, output: output * module.mask)
    optimizer = kfoc.NaturalGradient(model)
    x = torch.randn(5, 4)
    loss = model.train()(x).square().mean()
    optimizer.observe(x)
    loss.backward()


def test_a_resumed_fit_goes_on_from_the_buffers(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 3), Fading(), nn.Linear(3, 2)).eval()
    data = batches(torch.randn(9, 4), torch.randint(2, (9,)), 3)
    expected = kfoc.fit(model, data)
    every = kfoc.Checkpoint(tmp_path, seconds=None, batches=1)
    with pytest.raises(StopError):
        kfoc.fit(model, cut(data, 2), checkpoint=every)
    assert model[1].scales.tolist() == [1.0]
    assert same(kfoc.fit(model, data, checkpoint=every, resume=True), expected)
