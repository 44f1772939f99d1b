"""Batches of every kind give the numbers of plain pairs; the user's objects stay as they are."""

from __future__ import annotations

import copy
from collections import OrderedDict, UserDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence
from torch.utils.data import DataLoader, Dataset, TensorDataset

import kfoc
from kfoc.model.batches import moved
from models import FEW_PASSES, batches, convolutional, images


class Scaled(nn.Module):
    """Logits from two inputs, by order or by name; refuses labels."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        return self.layer(x * scale)


class Named(NamedTuple):
    x: Tensor
    scale: Tensor
    labels: Tensor | None = None


class Pair(NamedTuple):
    inputs: Any
    targets: Tensor


@dataclass(frozen=True)
class Frozen:
    x: Tensor
    scale: Tensor
    labels: Tensor | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.x, Tensor):
            raise TypeError("checked once, and not again in a copy")


class Read(Mapping[str, Tensor]):
    """A mapping that nothing can be written to."""

    def __init__(self, items: dict[str, Tensor]) -> None:
        self._items = items

    def __getitem__(self, key: str) -> Tensor:
        return self._items[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)


KINDS: dict[str, Any] = {
    "pair, tuple": lambda x, s, y: ((x, s), y),
    "pair, list": lambda x, s, y: [[x, s], y],
    "pair, dict": lambda x, s, y: ({"x": x, "scale": s}, y),
    "pair, dataclass": lambda x, s, y: (Frozen(x, s), y),
    "pair, NamedTuple": lambda x, s, y: (Named(x, s), y),
    "NamedTuple of two": lambda x, s, y: Pair((x, s), y),
    "dict": lambda x, s, y: {"x": x, "scale": s, "labels": y},
    "ordered": lambda x, s, y: OrderedDict(labels=y, x=x, scale=s),
    "UserDict": lambda x, s, y: UserDict(x=x, scale=s, labels=y),
    "read-only": lambda x, s, y: Read({"x": x, "scale": s, "labels": y}),
    "proxy": lambda x, s, y: MappingProxyType({"x": x, "scale": s, "labels": y}),
    "dataclass": Frozen,
    "NamedTuple": Named,
}


@pytest.mark.parametrize("fisher", ["mc", "empirical"])
@pytest.mark.parametrize("kind", KINDS)
def test_batches_of_every_kind(kind: str, fisher: str) -> None:
    """Labels are taken out of the batch: -100 among them has no influence."""
    model, x, scale, y = Scaled(), torch.randn(5, 4), torch.rand(5, 1), torch.randint(3, (5,))
    y[2] = -100
    expected = kfoc.fit(model, [((x, scale), y)], fisher=fisher)
    kept = torch.arange(5) != 2
    if fisher == "empirical":
        alone = kfoc.fit(model, [((x[kept], scale[kept]), y[kept])], fisher=fisher)
        torch.testing.assert_close(
            expected["layer"].to_dense(), alone["layer"].to_dense() * 4 / 5, rtol=1e-6, atol=1e-9
        )
    batch = KINDS[kind](x, scale, y)
    before = copy.deepcopy(batch) if kind != "proxy" else dict(batch)
    found = kfoc.fit(model, [batch], fisher=fisher)
    assert torch.equal(found["layer"].to_dense(), expected["layer"].to_dense())
    left = batch if kind != "proxy" else dict(batch)
    assert repr(left) == repr(before) or kind == "read-only"
    if isinstance(batch, Mapping):
        assert list(batch) == list(before)
        assert batch["labels"] is y


@pytest.mark.parametrize("kind", ["dict", "dataclass", "one", "one, list"])
def test_batches_without_targets(kind: str) -> None:
    model, x, scale = Scaled(), torch.randn(5, 4), torch.rand(5, 1)
    batch: Any = {
        "dict": {"x": x, "scale": scale},
        "dataclass": Frozen(x, scale),
        "one": ((x, scale),),
        "one, list": [{"x": x, "scale": scale}],
    }[kind]
    expected = kfoc.fit(model, [((x, scale), None)])["layer"].to_dense()
    assert torch.equal(kfoc.fit(model, [batch])["layer"].to_dense(), expected)
    with pytest.raises(ValueError, match='batch 0: fisher="empirical" needs integer class labels'):
        kfoc.fit(model, [batch], fisher="empirical")


def test_predict_gets_the_kind_of_the_batch() -> None:
    model, x, scale, y = Scaled(), torch.randn(5, 4), torch.rand(5, 1), torch.randint(3, (5,))

    class Tagged(UserDict):
        tag = "class"

    seen: list[Any] = []

    def predict(model: nn.Module, batch: Any) -> Tensor:
        seen.append(batch)
        batch = batch if isinstance(batch, Mapping) else vars(batch)
        return model(batch["x"], batch["scale"])

    tagged = Tagged(x=x, scale=scale, labels=y)
    tagged.tag = "instance"
    kfoc.fit(model, [tagged, Frozen(x, scale, y)], predict=predict, verify=False)
    assert type(seen[0]) is Tagged
    assert seen[0].tag == "instance"
    assert set(seen[0]) == {"x", "scale"}
    assert type(seen[1]) is Frozen
    assert seen[1].labels is None


def test_nested_tensors_are_moved_and_copied() -> None:
    """On the meta device, so that "moved" can be seen without a GPU."""
    model = nn.Linear(2, 2, device="meta")
    value = {"a": [torch.ones(1), (torch.ones(2), "text")], "b": Named(torch.ones(1), None, 3)}  # type: ignore[arg-type]
    found = moved(value, model)
    assert found["a"][0].is_meta
    assert found["a"][1][0].is_meta
    assert found["a"][1][1] == "text"
    assert found["b"].x.is_meta
    assert found["b"].scale is None
    assert type(found["b"]) is Named
    assert not value["a"][0].is_meta  # type: ignore[union-attr]
    assert not value["b"].x.is_meta  # type: ignore[union-attr]
    packed = pack_padded_sequence(torch.ones(3, 2, 2), torch.tensor([3, 1]))
    assert isinstance(moved(packed, model), PackedSequence)
    assert moved(packed, model).data.is_meta
    assert not moved(packed, model).batch_sizes.is_meta


@dataclass
class Output:
    logits: Any
    hidden: Any = None


class Wrapping(nn.Module):
    def __init__(self, inner: nn.Module, wrap: Any) -> None:
        super().__init__()
        self.inner, self.wrap = inner, wrap

    def forward(self, x: Tensor) -> Any:
        return self.wrap(self.inner(x))


def test_logits_are_taken_by_default() -> None:
    inner, (x, y) = convolutional(), images(6)
    expected = kfoc.fit(inner, [(x, y)])["0"].to_dense()
    model = Wrapping(inner, Output)
    assert torch.equal(kfoc.fit(model, [(x, y)])["inner.0"].to_dense(), expected)
    found = kfoc.fit(model, [(x, y)], predict=lambda m, x: m(x))
    assert torch.equal(found["inner.0"].to_dense(), expected)


@pytest.mark.parametrize("wrap", [lambda z: (z, z), lambda z: {"logits": z}, lambda z: Output(3)])
def test_other_objects_ask_for_predict(wrap: Any) -> None:
    model, (x, y) = Wrapping(convolutional(), wrap), images(6)
    with pytest.raises(ValueError, match=r"the model returned a \w+, not a tensor: pass predict="):
        kfoc.fit(model, [(x, y)])


@pytest.mark.parametrize("batch", [torch.ones(3, 4), (1, 2, 3), Named(torch.ones(1), 1)[:0], 7])
def test_batches_that_are_none(batch: Any) -> None:
    with pytest.raises(ValueError, match="batch 0: data must yield pairs"):
        kfoc.fit(nn.Linear(4, 3), [batch])


def test_smaller_last_batch() -> None:
    model, (x, y) = convolutional(), images(13)
    estimator = kfoc.KFOC("exact", rtol=1e-12, passes=60, buffer=0)
    whole = kfoc.fit(model, [(x, y)], estimator=kfoc.KFOC(rtol=1e-14))
    found = kfoc.fit(model, DataLoader(TensorDataset(x, y), 5), estimator=estimator)
    for layer in whole:
        torch.testing.assert_close(
            found[layer].to_dense(), whole[layer].to_dense(), rtol=1e-5, atol=1e-7
        )


@pytest.mark.parametrize("batch_size", [4, 12])
def test_shuffled_loaders_are_detected(batch_size: int) -> None:
    """Also where every batch has the same samples in another order: draws go by their place."""
    model, (x, y) = convolutional(), images(12)
    loader = DataLoader(TensorDataset(x, y), batch_size, shuffle=True)
    with pytest.raises(ValueError, match="several passes need the same batches each time"):
        kfoc.fit(model, _twice(loader), estimator=kfoc.KFOC("exact", rtol=0, buffer=0))


class _twice:  # noqa: N801 - a function in all but name
    """A loader, and a batch more, so that a single batch is not solved in one pass."""

    def __init__(self, loader: DataLoader) -> None:
        self.loader = loader

    def __iter__(self) -> Iterator[Any]:
        yield from self.loader
        yield from self.loader


class Augmented(Dataset):
    def __init__(self, x: Tensor, y: Tensor, noise: float, label_noise: bool) -> None:
        self.x, self.y, self.noise, self.label_noise = x, y, noise, label_noise

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        x = self.x[index] + self.noise * torch.randn_like(self.x[index])
        return x, torch.randint(3, ()) if self.label_noise else self.y[index]


@FEW_PASSES
def test_random_augmentation_is_detected() -> None:
    model, (x, y) = convolutional(), images(12)
    exact = kfoc.KFOC("exact", rtol=0, buffer=0)
    for noise in (1e-1, 1e-3):
        loader = DataLoader(Augmented(x, y, noise, False), 4)
        with pytest.raises(ValueError, match="no random augmentation"):
            kfoc.fit(model, loader, estimator=exact)
    labels = DataLoader(Augmented(x, y, 0.0, True), 4)
    with pytest.raises(ValueError, match="several passes need the same batches"):
        kfoc.fit(model, labels, estimator=exact, fisher="empirical")
    kfoc.fit(model, labels, estimator=exact)  # the model's own labels are drawn here


class Weighted(list):
    """Batches whose labels or weights are others in every pass."""

    generator = torch.Generator().manual_seed(0)

    def __iter__(self) -> Iterator[Any]:
        for x, y in super().__iter__():
            drawn = torch.rand(len(x), generator=self.generator)
            if isinstance(y, tuple):
                yield x, (y[0], drawn)
            else:
                yield x, torch.where(drawn < 0.5, -100, y)


@pytest.mark.parametrize("fisher", ["mc", "exact", "empirical"])
def test_other_weights_are_detected(fisher: str) -> None:
    """Also which labels are ignored, where the model's own are drawn."""
    model, (x, y) = convolutional(), images(12)
    estimator = kfoc.KFOC("exact", rtol=0, buffer=0)
    ignored = Weighted(batches(x, y, 4))
    weighted = Weighted((part, (labels, None)) for part, labels in batches(x, y, 4))
    for data, likelihood in ((ignored, "categorical"), (weighted, kfoc.SampleWeighted())):
        with pytest.raises(ValueError, match="several passes need the same batches"):
            kfoc.fit(model, data, likelihood, estimator=estimator, fisher=fisher)
        if fisher != "mc":
            of_model = kfoc.Fisher(model, data, likelihood, fisher=fisher)
            vector = {name: p.detach() for name, p in model.named_parameters()}
            of_model.matvec(vector)
            with pytest.raises(ValueError, match="several passes need the same batches"):
                of_model.matvec(vector)


class Normalised(nn.Module):
    """Convolution, every normalisation in use, linear layers; logits of 3 classes."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(2, 4, 3, padding=1)
        self.batch = nn.BatchNorm2d(4)
        self.group = nn.GroupNorm(2, 4)
        self.up = nn.ConvTranspose2d(4, 4, 2, stride=2)
        self.layer = nn.LayerNorm(4)
        self.rms = nn.RMSNorm(4)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.group(self.batch(self.convolution(x))))
        x = self.up(x).mean((2, 3)) * 4
        # The fused RMSNorm warns of mixed precision under autocast.
        return self.head(self.rms(self.layer(x).to(self.rms.weight.dtype)))


def normalised() -> Normalised:
    model = Normalised()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5)
    model.batch.running_mean.normal_()  # type: ignore[union-attr,operator]
    return model.eval()


def relative(found: kfoc.Block, expected: kfoc.Block) -> float:
    difference = found.to_dense().double() - expected.to_dense().double()
    return (difference.norm() / expected.to_dense().double().norm()).item()


HALF = [(torch.bfloat16, 0.08), (torch.float16, 0.03)]


@pytest.mark.parametrize("estimator", [kfoc.KFOC(), kfoc.KFAC(), kfoc.BlockDiagonal()])
@pytest.mark.parametrize(("dtype", "tolerance"), HALF)
def test_half_precision_weights(
    dtype: torch.dtype, tolerance: float, estimator: kfoc.Estimator
) -> None:
    model, (x, y) = normalised().float(), images(24, torch.float32)
    options: dict[str, Any] = {"fisher": "empirical", "estimator": estimator}
    expected = kfoc.fit(model, batches(x, y, 8), **options)
    found = kfoc.fit(copy.deepcopy(model).to(dtype), batches(x.to(dtype), y, 8), **options)
    assert list(found) == list(expected) == [n for n, _ in model.named_children()]
    for layer in expected:
        assert found[layer].to_dense().dtype == torch.float32
        assert relative(found[layer], expected[layer]) < tolerance, layer


@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize(("dtype", "tolerance"), HALF)
def test_autocast(dtype: torch.dtype, tolerance: float, inside: bool) -> None:
    """Around the call of the model, or in its forward."""
    model, (x, y) = normalised().float(), images(24, torch.float32)

    class Casting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast("cpu", dtype=dtype):
                return self.inner(x)

    def predict(model: nn.Module, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=dtype):
            return model(x)

    expected = kfoc.fit(model, batches(x, y, 8), fisher="empirical")
    if inside:
        found = kfoc.fit(Casting(), batches(x, y, 8), fisher="empirical")
    else:
        found = kfoc.fit(model, batches(x, y, 8), fisher="empirical", predict=predict)
    assert len(found) == len(expected)
    for layer in expected:
        block = found[f"inner.{layer}" if inside else layer]
        assert block.to_dense().dtype == torch.float32
        assert relative(block, expected[layer]) < tolerance, layer


def test_weights_used_elsewhere_are_found_under_autocast() -> None:
    """Autocast casts a weight once for all its uses: the graph has one edge to it."""

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                hidden = torch.tanh(self.layer(x))
                return self.head(nn.functional.linear(hidden, self.layer.weight))

    model, x = Twice().float(), torch.randn(5, 4, dtype=torch.float32)
    y = torch.randint(3, (5,))
    curvature = kfoc.fit(model, [(x, y)], fisher="empirical", estimator=kfoc.BlockDiagonal())
    assert "head" in curvature
    if "layer" not in curvature:
        assert "used outside of it" in curvature.skipped["layer"]
        return
    rows = []
    for n in range(len(x)):
        loss = nn.functional.cross_entropy(model(x[n : n + 1]).float(), y[n : n + 1])
        weight, bias = torch.autograd.grad(loss, model.layer.parameters())
        layout = curvature.layouts["layer"]
        gradients = {"layer.weight": weight, "layer.bias": bias}
        rows.append(layout.join(gradients).flatten())
    expected = torch.stack(rows).mT @ torch.stack(rows) / len(x)
    difference = (curvature["layer"].to_dense() - expected).norm()
    assert difference < 0.05 * expected.norm()


@pytest.mark.parametrize("estimator", [kfoc.KFOC(), kfoc.KFAC(), kfoc.BlockDiagonal()])
def test_channels_last(estimator: kfoc.Estimator) -> None:
    model, (x, y) = normalised(), images(12)
    expected = kfoc.fit(model, batches(x, y, 5), estimator=estimator)
    last = copy.deepcopy(model).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    found = kfoc.fit(
        last, batches(x.to(memory_format=torch.channels_last), y, 5), estimator=estimator
    )
    for layer in expected:
        assert relative(found[layer], expected[layer]) < 1e-12, layer
