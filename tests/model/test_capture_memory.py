"""A layer's samples go when it is taken in, and the backward pass has not yet gone on below it."""

from __future__ import annotations

import gc
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.profiler import profile

import kfoc
from kfoc.samples.base import LayerSamples

DEPTH, WIDTH, COUNT = 8, 64, 4096
ACTIVATION = COUNT * WIDTH * 8  # bytes, in float64


def deep() -> nn.Sequential:
    torch.manual_seed(0)
    hidden = [[nn.Linear(WIDTH, WIDTH), nn.ReLU()] for _ in range(DEPTH)]
    return nn.Sequential(*[layer for pair in hidden for layer in pair], nn.Linear(WIDTH, 3))


class Residual(nn.Module):
    """Branches: of which none, one or two go on to a layer below."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 6), nn.Linear(6, 6)
        self.beside, self.last = nn.Linear(4, 6), nn.Linear(6, 3)
        self.unused = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.relu(self.first(x))
        self.unused(self.second(hidden))
        return self.last(hidden + self.second(torch.tanh(hidden)) + self.beside(x))


@dataclass(frozen=True)
class Watching(kfoc.KFAC):
    """Counts the tensors of an input's or a gradient's shape when a layer is taken in.

    Attributes:
        seen: the layer's outputs, and the count.
    """

    seen: list[tuple[int, int]] = field(default_factory=list)

    def begin(self, layer: str, samples: LayerSamples) -> kfoc.State:
        return Watched(self.seen)


@dataclass
class Watched(kfoc.State):
    seen: list[tuple[int, int]]

    def add(self, samples: LayerSamples, alone: bool) -> None:
        shape = (samples.num_samples, WIDTH)
        found = [each for each in gc.get_objects() if type(each) is Tensor and each.shape == shape]
        self.seen.append((samples.shape[0], len(found)))

    def block(self, num_samples: float) -> kfoc.Block:
        return kfoc.DiagonalBlock(torch.zeros(1, 1))


def test_what_a_layer_saw_is_gone_when_the_one_below_is_taken_in() -> None:
    estimator = Watching()
    found = kfoc.fit(deep(), [(torch.randn(16, WIDTH), None)], estimator=estimator)
    # From the last layer, of three outputs, down: of each input that is still needed there are the
    # tensor in the graph and the recorded one; and there is the gradient that has just come.
    outputs, alive = zip(*estimator.seen, strict=True)
    assert outputs == (3, *[WIDTH] * DEPTH)
    assert all(count <= 2 * (DEPTH + 1 - k) + 1 for k, count in enumerate(alive))
    assert list(found) == [str(2 * k) for k in range(DEPTH + 1)]


@pytest.mark.parametrize("fisher", ["mc", "exact"])
def test_the_gradients_are_never_there_all_at_once(fisher: str) -> None:
    """The activations are, and a few more tensors of their size: what goes into a ReLU's backward
    and what comes out, and a layer's stacked directions. All gradients would be as many again."""
    model, x = deep(), torch.randn(COUNT, WIDTH)

    def call() -> None:
        kfoc.fit(model, [(x, None)], estimator=kfoc.KFAC(), fisher=fisher)

    call()
    with profile(use_cpu=True, profile_memory=True) as trace:
        call()
    events = [e for e in trace.kineto_results.events() if e.name() == "[memory]"]
    alive = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        alive += event.nbytes()
        peak = max(peak, alive)
    # The first two of three directions are kept of all layers.
    held, more = (DEPTH, 3) if fisher == "mc" else (3 * DEPTH, 5)
    assert held * ACTIVATION < peak < (held + more) * ACTIVATION


@pytest.mark.parametrize("fisher", ["empirical", "exact"])
def test_branches_get_what_autograd_gives_at_the_end(fisher: str) -> None:
    torch.manual_seed(0)
    model, x = Residual().double(), torch.randn(10, 4, dtype=torch.float64)
    labels = torch.arange(10) % 3
    found = kfoc.fit(model, [(x, labels)], estimator=kfoc.BlockDiagonal(), fisher=fisher)
    assert list(found) == ["first", "second", "beside", "last", "unused"]
    total = dict.fromkeys(found, 0.0)
    for n in range(10):
        p = model(x[n : n + 1]).softmax(1).detach()[0]
        observed = [(labels[n].item(), 1.0)]
        for c, weight in observed if fisher == "empirical" else enumerate(p.tolist()):
            model.zero_grad()
            model(x[n : n + 1]).log_softmax(1)[0, int(c)].backward()
            for name in [name for name in found if name != "unused"]:
                layer = model.get_submodule(name)
                both = torch.cat([layer.weight.grad, layer.bias.grad[:, None]], 1).flatten()  # type: ignore[union-attr,index,list-item]
                total[name] = total[name] + weight * torch.outer(both, both) / 10
    assert not found["unused"].to_dense().any()
    for name, block in found.items():
        if name == "unused":
            continue
        torch.testing.assert_close(block.to_dense(), total[name])
