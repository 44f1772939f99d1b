"""What a fit may ask of an estimator, crossed with every estimator and wrapper there is.

A new one is a line in `EVERY`. Layers of all kinds of samples; several ranks, decay and saved
states without processes or files: by wrappers of a layer's state, of a few lines each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import kfoc
import oracle
from kfoc.compare.timed import timed
from kfoc.errors import Footprint
from kfoc.estimators.base import State
from kfoc.estimators.pooling import Gather, Largest, Pooling, Sum
from kfoc.files.encoding import decoded, encoded
from kfoc.samples.base import LayerSamples
from models import FEW_PASSES, batches
from own_estimator import Isotropic

PLAIN = ("0", "6")  # linear maps, for which the oracle forms F


class Net(nn.Sequential):
    """A convolution, a normalisation, a depthwise and a grouped convolution, a linear layer."""

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(2, 4, 2),
            nn.GroupNorm(2, 4),
            nn.Conv2d(4, 4, 2, groups=4),
            nn.Tanh(),
            nn.Conv2d(4, 4, 1, groups=2),
            nn.Flatten(),
            nn.Linear(36, 3),
        )


@dataclass(frozen=True)
class Case:
    """An estimator, and how far batch by batch may be from all data at once, in relative error."""

    build: Callable[[nn.Module], kfoc.Estimator]
    slack: float = 1e-9
    one_pass: bool = True


EVERY: dict[str, Case] = {
    "online": Case(lambda model: kfoc.KFOC(), 0.02),
    "online, no buffer": Case(lambda model: kfoc.KFOC(buffer=0), 0.02),
    "running": Case(lambda model: kfoc.KFOC("running"), 0.3),
    "approx": Case(lambda model: kfoc.KFOC("approx"), 0.4),
    "exact": Case(lambda model: kfoc.KFOC("exact", buffer=0), 1e-4, False),
    "rank 2": Case(lambda model: kfoc.KFOC(rank=2, buffer=0), 0.02),
    "exact rank 2": Case(lambda model: kfoc.KFOC("exact", rank=2, buffer=0), 1e-4, False),
    "kfac": Case(lambda model: kfoc.KFAC()),
    "diagonal": Case(lambda model: kfoc.Diagonal()),
    "dense": Case(lambda model: kfoc.BlockDiagonal()),
    "ekfac": Case(lambda model: kfoc.EigenCorrected(kfoc.KFAC()), one_pass=False),
    "ek-foc": Case(lambda model: kfoc.EigenCorrected(kfoc.KFOC(buffer=0)), 0.02, False),
    "of one's own": Case(lambda model: Isotropic()),
    "timed": Case(lambda model: timed(kfoc.KFOC(buffer=0), {}), 0.02),
    "timed EKFAC": Case(lambda model: timed(kfoc.EigenCorrected(kfoc.KFAC()), {}), one_pass=False),
}
every = pytest.mark.parametrize("name", EVERY)
pytestmark = FEW_PASSES


@dataclass(frozen=True)
class Wrapped(kfoc.Estimator):
    """An estimator whose states are wrapped."""

    base: kfoc.Estimator
    wrap: Callable[[Callable[[], State]], State]

    @property
    def pass_limit(self) -> int:
        return self.base.pass_limit

    def begin(self, layer: str, samples: LayerSamples) -> State:
        return self.wrap(lambda: self.base.begin(layer, samples))


class Saved(State):
    """Written down and read again before every batch and pass."""

    def __init__(self, begin: Callable[[], State]) -> None:
        self.state = begin()

    def _again(self) -> State:
        self.state = decoded(encoded(self.state), "cpu")
        return self.state

    def add(self, samples: LayerSamples, alone: bool) -> None:
        self._again().add(samples, alone)

    def next_pass(self) -> bool:
        return self._again().next_pass()

    def block(self, num_samples: float) -> kfoc.Block:
        return self._again().block(num_samples)


class Ranked(State):
    """Two ranks that take turns with the batches."""

    def __init__(self, begin: Callable[[], State]) -> None:
        self.states = [begin(), begin()]
        self.turn = 0

    def add(self, samples: LayerSamples, alone: bool) -> None:
        self.states[self.turn].add(samples, False)
        self.turn = 1 - self.turn

    def next_pass(self) -> bool:
        pooled([state.pooled() for state in self.states])
        first, second = [state.next_pass() for state in self.states]
        assert first == second
        return first

    def block(self, num_samples: float) -> kfoc.Block:
        first, second = [state.block(num_samples) for state in self.states]
        assert torch.equal(first.to_dense(), second.to_dense())
        return first


def pooled(poolings: list[Pooling[None]]) -> None:
    """Meet the requests of all ranks, round by round."""
    for round_ in zip(*poolings, strict=True):
        for requests in zip(*round_, strict=True):
            if isinstance(requests[0], Sum):
                for tensors in zip(*(request.tensors for request in requests), strict=True):
                    total = torch.stack(tensors).sum(0)
                    for tensor in tensors:
                        assert tensor.is_contiguous()
                        tensor.copy_(total)
            elif isinstance(requests[0], Largest):
                values = zip(*(request.values for request in requests), strict=True)
                largest = [max(each) for each in values]
                for request in requests:
                    request.values[:] = largest
            else:
                assert isinstance(requests[0], Gather)
                for request in requests:
                    request.found = [[t.clone() for t in other.tensors] for other in requests]


class Decayed(State):
    """Before every batch, what was added counts half."""

    def __init__(self, begin: Callable[[], State]) -> None:
        self.state = begin()
        self.weight = 0.0

    def add(self, samples: LayerSamples, alone: bool) -> None:
        if self.weight:
            self.state.decay(0.5)
        self.weight = 0.5 * self.weight + samples.num_samples
        self.state.add(samples, False)

    def next_pass(self) -> bool:
        return self.state.next_pass()

    def block(self, num_samples: float) -> kfoc.Block:
        return self.state.block(self.weight)


def problem(dtype: torch.dtype = torch.float64) -> tuple[nn.Module, Tensor, Tensor]:
    """Gradients of every other three samples are larger, and so are those of one of two ranks."""
    x, y = torch.randn(12, 2, 5, 5), torch.randn(4, 3, 3)
    y[::2] *= 20
    return Net().to(dtype), x.to(dtype), y.flatten(0, 1).to(dtype)


def fitted(model: nn.Module, x: Tensor, y: Tensor, size: int, estimator: kfoc.Estimator, **options):
    data = batches(x, y, size)
    return kfoc.fit(model, data, "gaussian", fisher="empirical", estimator=estimator, **options)


def errors(model: nn.Module, x: Tensor, y: Tensor, found: kfoc.Curvature) -> Iterator[float]:
    """Relative errors of all layers, for the F of these samples."""
    dense = fitted(model, x, y, len(x), kfoc.BlockDiagonal())
    for layer, block in found.items():
        fisher = dense[layer].to_dense()
        if layer in PLAIN:
            residuals = (y - model(x).detach())[None]
            fisher = oracle.fisher_block(model, layer, x, residuals)
        yield oracle.relative_error(fisher, block.to_dense())


def assert_as_good(
    name: str, found: kfoc.Curvature, model: nn.Module, x: Tensor, y: Tensor
) -> None:
    """As all samples in one batch, but for the slack."""
    case = EVERY[name]
    whole = fitted(model, x, y, len(x), case.build(model))
    assert found.keys() == whole.keys() == {"0", "1", "2", "4", "6"}
    pairs = zip(errors(model, x, y, found), errors(model, x, y, whole), strict=True)
    for error, of_whole in pairs:
        assert error <= of_whole + case.slack
    if case.slack < 1e-6:
        for layer in found:
            torch.testing.assert_close(found[layer].to_dense(), whole[layer].to_dense())


@every
def test_batches(name: str) -> None:
    model, x, y = problem()
    assert_as_good(name, fitted(model, x, y, 5, EVERY[name].build(model)), model, x, y)


@every
def test_ranks(name: str) -> None:
    model, x, y = problem()
    estimator = Wrapped(EVERY[name].build(model), Ranked)
    assert_as_good(name, fitted(model, x, y, 3, estimator), model, x, y)


@pytest.mark.parametrize("name", [name for name, case in EVERY.items() if case.one_pass])
def test_decay(name: str) -> None:
    """Three batches that count 1/4, 1/2 and 1, as if there were one, two and four of them."""
    model, x, y = problem()
    estimator = Wrapped(EVERY[name].build(model).streaming(), Decayed)
    found = fitted(model, x, y, 4, estimator)
    weighted = [torch.cat([each[:4], *[each[4:8]] * 2, *[each[8:]] * 4]) for each in (x, y)]
    assert_as_good(name, found, model, *weighted)


@every
def test_budget(name: str, tmp_path: Path) -> None:
    """With room for the largest layer alone, and so in several sweeps."""
    model, x, y = problem()
    estimator = EVERY[name].build(model)
    if name == "of one's own":
        with pytest.raises(ValueError, match="does not say how much memory its states take"):
            fitted(model, x, y, 5, estimator, memory_budget=2**20)
        return
    sizes: list[Footprint] = []

    class Asked(Wrapped):
        def begin(self, layer: str, samples: LayerSamples) -> State:
            sizes.append(estimator.footprint(samples))
            return estimator.begin(layer, samples)

    plain = fitted(model, x, y, 5, Asked(estimator, Saved))
    assert len(sizes) == len(plain)
    room = max(size.state + size.block for size in sizes)
    tight = fitted(model, x, y, 5, estimator, memory_budget=room, storage=tmp_path / "blocks")
    for layer in plain:
        torch.testing.assert_close(tight[layer].to_dense(), plain[layer].to_dense())


@every
def test_resume(name: str) -> None:
    """To the bit, from whatever batch or pass."""
    if name.startswith("timed") or name == "of one's own":
        pytest.skip("its states have no name in files")
    model, x, y = problem()
    estimator = EVERY[name].build(model)
    plain = fitted(model, x, y, 5, estimator)
    again = fitted(model, x, y, 5, Wrapped(estimator, Saved))
    for layer in plain:
        assert torch.equal(again[layer].to_dense(), plain[layer].to_dense())


@every
def test_probes(name: str) -> None:
    model, x, y = problem()
    found = fitted(model, x, y, 5, EVERY[name].build(model), probes=200)
    for error, block in zip(errors(model, x, y, found), found.values(), strict=True):
        spread = block.report.standard_error
        assert block.report.relative_error == pytest.approx(error, abs=0.02 + 4 * (spread or 0))


@every
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtypes(name: str, dtype: torch.dtype) -> None:
    model, x, y = problem(dtype)
    found = fitted(model, x, y, 5, EVERY[name].build(model))
    exact = fitted(model.double(), x.double(), y.double(), 5, EVERY[name].build(model))
    for layer, block in found.items():
        dense = block.to_dense()
        assert dense.dtype == (torch.float32 if dtype == torch.bfloat16 else dtype)
        # Rounding may decide whether half steps are taken, where some may be left out.
        near = 0.1 if dtype == torch.bfloat16 else max(2 * EVERY[name].slack, 1e-3)
        assert oracle.relative_error(exact[layer].to_dense(), dense.double()) < near
