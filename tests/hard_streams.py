"""Hard streams for estimators of one pass, and how far what they give is from the optimum.

Networks trained nearly to the end, so that few samples carry most of F, in orders that hide what is
to come. Fits are by the public API alone; the optimum is that of `oracle`, which shares nothing
with it. For tests/test_onepass.py, its ranks (onepass_worker.py) and benchmarks/onepass.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

import kfoc
import oracle

Data = list[tuple[Tensor, Tensor]]
BUFFERED = 6  # batches that a buffer holds, where there is one
STEPS, RATE = 80, 1e-2
# By seed: well separated classes end with few samples that matter, others with a flat spectrum.
NOISE = (0.6, 0.9, 1.2)


class Attention(nn.Module):
    """One block of a transformer over 6 tokens, of linear layers that all tokens share."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(10, 30), nn.Linear(10, 10)
        self.up, self.down, self.head = nn.Linear(10, 24), nn.Linear(24, 10), nn.Linear(10, 4)

    def forward(self, x: Tensor) -> Tensor:
        # Heads of 5, by hand: the fused kernels have no derivatives under vmap.
        query, key, value = (
            part.unflatten(-1, (2, 5)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1)
        )
        mixed = (query @ key.mT / 5**0.5).softmax(-1) @ value
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        x = x + self.down(torch.tanh(self.up(x)))
        return self.head(x.mean(1))


def mlp() -> nn.Module:
    return nn.Sequential(
        nn.Linear(11, 20), nn.ReLU(), nn.Linear(20, 14), nn.ReLU(), nn.Linear(14, 5)
    )


def convolutions() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 10, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(10, 8, 3, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(72, 4),
    )


@dataclass(frozen=True)
class Network:
    """How to build it, what it takes, and how many numbers a sample of a usual layer of it has.

    With buffers of that many times 6 batches of 10, no layer's F is small enough to be summed.
    """

    build: Any
    shape: tuple[int, ...]
    classes: int
    numbers: int


NETWORKS = {
    "MLP": Network(mlp, (11,), 5, 32),
    "convolutions": Network(convolutions, (3, 6, 6), 4, 400),
    "attention": Network(Attention, (6, 10), 4, 160),
}


@dataclass(frozen=True)
class Problem:
    """A trained classifier and what it was trained on, in float64."""

    model: nn.Module
    inputs: Tensor
    targets: Tensor


@contextmanager
def float64() -> Iterator[None]:
    """The default here, whatever it is elsewhere: fixtures of modules run before that of tests."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@cache
@float64()
def problem(network: str, seed: int, samples: int) -> Problem:
    """The same in every process; the global state of the generator stays as it is."""
    kind = NETWORKS[network]
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(seed)
        targets = torch.randint(kind.classes, (samples,))
        centres = torch.randn(kind.classes, *kind.shape)
        noise = torch.randn(samples, *kind.shape)
        inputs = centres[targets] + NOISE[seed % len(NOISE)] * noise
        model = kind.build()
        optimizer = torch.optim.Adam(model.parameters(), RATE)
        for _ in range(STEPS):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(inputs), targets).backward()
            optimizer.step()
        model.zero_grad(set_to_none=True)
    return Problem(model, inputs, targets)


@dataclass(frozen=True)
class Case:
    """One fit over a stream of batches.

    Attributes:
        order: "in order", "sorted" by class, or "shuffled".
        buffered: with a buffer of about `BUFFERED` batches, or none.
        estimator: "online", "running", "rank 2", ..., or "head 1", ..., of that many triples.
        shards: how batches are dealt to `world` ranks: "even" (in turn), "uneven" (the first has
            more than half, the last the least) or "sorted" (each the next range of the stream).
    """

    network: str
    seed: int
    samples: int
    order: str
    batch: int
    buffered: bool
    estimator: str = "online"
    shards: str = ""
    world: int = 1

    @property
    def problem(self) -> Problem:
        return problem(self.network, self.seed, self.samples)

    @property
    def buffer(self) -> int:
        return NETWORKS[self.network].numbers * self.batch * BUFFERED if self.buffered else 0

    @property
    def rank(self) -> int:
        return int(self.estimator.removeprefix("rank ")) if "rank" in self.estimator else 1

    def data(self) -> Data:
        """The whole stream."""
        inputs, targets = self.problem.inputs, self.problem.targets
        generator = torch.Generator().manual_seed(self.seed)
        orders = {
            "in order": torch.arange(len(targets)),
            "sorted": targets.argsort(stable=True),
            "shuffled": torch.randperm(len(targets), generator=generator),
        }
        chosen = orders[self.order]
        return batches(inputs[chosen], targets[chosen], self.batch)

    def shard(self, rank: int) -> Data:
        return sharded(self.data(), self.shards, rank, self.world)

    def options(self) -> dict[str, Any]:
        """Of `kfoc.fit`, but for model, data and group."""
        if self.estimator == "running":
            estimator = kfoc.KFOC("running", buffer=self.buffer)
        elif self.estimator.startswith("head"):
            head = int(self.estimator.removeprefix("head "))
            estimator = kfoc.KFOC(head=head, buffer=self.buffer)
        else:
            estimator = kfoc.KFOC(rank=self.rank, buffer=self.buffer)
        return {"estimator": estimator, "fisher": "empirical"}

    def excesses(self) -> list[float]:
        """Of a fit in this process, by layer."""
        found = kfoc.fit(self.problem.model, self.data(), **self.options())
        assert found.num_samples == self.samples
        return self.judged({layer: factors(found[layer]) for layer in found})

    def judged(self, found: dict[str, tuple[Tensor, Tensor]]) -> list[float]:
        """The excess of each layer's factors, (r, o, o) and (r, i, i)."""
        exact = fishers(self.network, self.seed, self.samples)
        assert list(found) == list(exact)
        return [excess(exact[layer], *pair, self.rank) for layer, pair in found.items()]


def batches(inputs: Tensor, targets: Tensor, size: int) -> Data:
    return list(zip(inputs.split(size), targets.split(size), strict=True))


def sharded(data: Data, how: str, rank: int, world: int) -> Data:
    if how == "even":
        return data[rank::world]
    if how == "sorted":
        ends = [len(data) * k // world for k in range(world + 1)]
    else:  # shares of 2^world - 1: 8, 4, 2, 1
        ends = [len(data) * (2**world - 2 ** (world - k)) // (2**world - 1) for k in range(world)]
        ends.append(len(data))
    return data[ends[rank] : ends[rank + 1]]


def factors(block: kfoc.Block) -> tuple[Tensor, Tensor]:
    """(r, o, o) and (r, i, i), of a product or of a sum of r."""
    if isinstance(block, kfoc.LowRankBlock):
        return block.lefts, block.rights
    assert isinstance(block, kfoc.KroneckerBlock)
    return block.left[None], block.right[None]


@dataclass(frozen=True)
class Exact:
    """F of a layer, (o * i, o * i), and the singular values of its rearrangement."""

    fisher: Tensor
    shape: tuple[int, int]
    singular: Tensor

    def optimum(self, rank: int) -> float:
        """The relative error of the closest sum of so many products."""
        return (self.singular[rank:].norm() / self.singular.norm()).item()


def exact_of(fisher: Tensor, o: int, i: int) -> Exact:
    return Exact(fisher, (o, i), torch.linalg.svdvals(oracle.rearranged(fisher, o, i)))


@cache
@float64()
def fishers(network: str, seed: int, samples: int) -> dict[str, Exact]:
    """By layer, of the observed labels of all samples."""
    each = problem(network, seed, samples)
    rows = gradients(each.model, each.inputs, each.targets)
    return {layer: mean_of(part) for layer, part in rows.items()}


def gradients(model: nn.Module, inputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """Every sample's gradient of its log-likelihood by the layers' `[W | b]`, (N, o, i)."""
    cotangents = oracle.categorical_observed(model(inputs).detach(), targets)
    return {
        name: oracle.sample_gradients(model, name, inputs, cotangents)[0].detach()
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d)
    }


def mean_of(rows: Tensor, weights: Tensor | None = None) -> Exact:
    """F of samples (N, o, i): the mean, or that of these weights."""
    flat = rows.flatten(1)
    weights = torch.full((len(rows),), 1 / len(rows)) if weights is None else weights
    return exact_of(flat.mT @ (flat * weights.to(flat)[:, None]), *rows.shape[1:])


def excess(exact: Exact, lefts: Tensor, rights: Tensor, rank: int = 1) -> float:
    """By how much the relative error of a sum of products exceeds the least that there is."""
    assert (len(lefts), lefts.shape[1], rights.shape[1]) == (rank, *exact.shape)
    pairs = zip(lefts, rights, strict=True)
    dense = torch.stack([torch.kron(left, right) for left, right in pairs]).sum(0)
    found = oracle.relative_error(exact.fisher, dense) - exact.optimum(rank)
    assert found > -1e-9, "better than the optimum: one of the two is not of these samples"
    return found


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
