"""Parameters as layers of their own: every block against every sample run by itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import kfoc
import oracle
from every_layer import check_every_block
from models import batches, convolutional, images

APART = ["*weight", "*bias"]


class Attending(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attend = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attend(x, x, x, need_weights=False)[0].sin().mean(1)


class Tied(nn.Module):
    """A head with the embedding's weight, and a bias of its own."""

    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(5, 3), nn.Linear(3, 5, bias=bias)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.embed(tokens).sin()).mean(1)


def twins() -> nn.Module:
    first, second = nn.Linear(4, 4), nn.Linear(4, 4)
    second.weight, second.bias = first.weight, first.bias
    return nn.Sequential(first, nn.Tanh(), second)


def flat(*layers: nn.Module) -> nn.Module:
    return nn.Sequential(*layers, nn.Tanh(), nn.Flatten(), nn.LazyLinear(3))


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: flat(nn.Linear(3, 2), nn.Linear(2, 4)), (6, 3)),
    "positions": (lambda: flat(nn.Linear(3, 2)), (6, 5, 3)),
    "one parameter": (lambda: flat(nn.Linear(3, 2, bias=False), nn.RMSNorm(2)), (6, 3)),
    "convolution": (lambda: flat(nn.Conv2d(2, 3, 2, padding=1)), (6, 2, 3, 3)),
    "groups": (lambda: flat(nn.Conv1d(4, 6, 2, groups=2)), (6, 4, 5)),
    "depthwise": (lambda: flat(nn.Conv1d(4, 4, 2, groups=4)), (6, 4, 5)),
    "bilinear": (lambda: Pair(), (6, 3)),
    "normalisation": (lambda: flat(nn.LayerNorm(4)), (6, 5, 4)),
    "batch norm": (lambda: flat(nn.BatchNorm1d(4)).eval(), (6, 4, 5)),
    "attention": (Attending, (6, 3, 4)),
    "twins": (twins, (6, 4)),
}


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.both = nn.Bilinear(3, 3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.both(x, x.cos())


def apart(model: nn.Module, *inputs: Tensor) -> kfoc.Curvature:
    found = check_every_block(model, *inputs, layers=APART)
    assert all(parameters == (name,) for name, parameters in found.parameters.items())
    return found


@pytest.mark.parametrize("name", MODELS)
def test_every_block_is_of_one_parameter(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kfoc.layers.selection.LOOSE_LIMIT", 0)
    build, shape = MODELS[name]
    x = torch.randn(shape)
    model = build()
    model(x[:2])
    apart(model, x)


def test_a_weight_tied_to_an_embedding(monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = torch.randint(5, (6, 4))
    found = apart(Tied(bias=True), tokens)  # by samples one by one
    assert set(found) == {"embed.weight", "head.bias"}
    monkeypatch.setattr("kfoc.layers.selection.LOOSE_LIMIT", 0)
    (block,) = kfoc.fit(Tied(bias=False), [(tokens, None)], layers="embed.weight").values()
    assert isinstance(block, kfoc.KroneckerBlock)


@pytest.mark.parametrize("layers", [["0.weight", "2"], ["2.weight", "0"]])
def test_no_parameter_is_in_two_blocks(layers: list[str]) -> None:
    """Of twins, one by its weight and the other as a whole: the bias is not forgotten."""
    model, x = twins(), torch.randn(6, 4)
    options: dict = {"likelihood": "gaussian", "fisher": "exact"}
    options["estimator"] = kfoc.BlockDiagonal()
    whole = kfoc.fit(model, [(x, None)], **options)["0"].to_dense().view(4, 5, 4, 5)
    found = kfoc.fit(model, [(x, None)], layers=layers, **options)
    held = [model.get_parameter(name) for names in found.parameters.values() for name in names]
    assert len(held) == len({*map(id, held)}) == 2
    for layer, names in found.parameters.items():
        columns = slice(-1, None) if "bias" in names[0] else slice(0, 5 if len(names) > 1 else 4)
        expected = whole[:, columns, :, columns].flatten(2).flatten(0, 1)
        torch.testing.assert_close(found[layer].to_dense(), expected)


def test_blocks_are_parts_of_the_layers() -> None:
    """The weight's product is the best one of the weight alone, and the bias's block is exact."""
    model, (x, y) = convolutional(), images(20)
    model = nn.Sequential(nn.ConvTranspose2d(2, 2, 1), nn.Tanh(), *model)
    cotangents = oracle.categorical_exact(model(x).detach())
    found = kfoc.fit(model, [(x, y)], fisher="exact", layers=APART, estimator=kfoc.KFOC(rtol=0))
    for layer in ("0", "2", "5", "7"):
        fisher = oracle.fisher_block(model, layer, x, cotangents)
        o, i = len(model[int(layer)].bias), found[f"{layer}.weight"].shape[1] + 1
        parts = fisher.view(o, i, o, i)
        weight = parts[:, :-1, :, :-1].reshape(o * (i - 1), -1)
        best, _, _ = oracle.optimum(weight, o, i - 1)
        assert oracle.relative_error(best, found[f"{layer}.weight"].to_dense()) < 1e-6
        bias = found[f"{layer}.bias"]
        torch.testing.assert_close(bias.to_dense(), parts[:, -1, :, -1])


def test_in_parts_of_the_data_and_the_layers_and_on_from_a_file(tmp_path: Path) -> None:
    model, (x, y) = convolutional(), images(20)
    options: dict = {"estimator": kfoc.KFAC(), "layers": APART}
    whole = kfoc.fit(model, [(x, y)], **options)
    data = batches(x, y, 5)

    def interrupted() -> Iterator[tuple[Tensor, Tensor]]:
        yield from data[:2]
        raise KeyboardInterrupt

    saving = kfoc.Checkpoint(tmp_path, batches=1)
    with pytest.raises(KeyboardInterrupt):
        kfoc.fit(model, interrupted(), checkpoint=saving, **options)
    tracker = kfoc.Tracker(model, **options)
    for batch in data[:2]:
        tracker.update(*batch)
    again = kfoc.Tracker(model, **options)
    again.load_state_dict(tracker.state_dict())
    for batch in data[2:]:
        again.update(*batch)
    found = (
        kfoc.fit(model, data, checkpoint=tmp_path, resume=True, **options),
        kfoc.fit(model, data, memory_budget=100_000, **options),
        again.curvature(),
    )
    for each in found:
        assert list(each) == list(whole)
        for name in whole:
            torch.testing.assert_close(each[name].to_dense(), whole[name].to_dense())


def test_layers_come_before_parameters() -> None:
    model, (x, y) = convolutional(), images(8)

    def blocks(*layers: str) -> list[str]:
        return list(kfoc.fit(model, [(x, y)], layers=layers))

    assert blocks("*") == ["0", "3", "5"]
    assert blocks("3", "5.bias") == ["3", "5.bias"]
    assert blocks("3", "3.bias") == ["3"]
    with pytest.raises(ValueError, match=r"'3\.b' matches no layer with parameters"):
        blocks("3.b")


def test_what_cannot_be_treated_alone() -> None:
    model, (x, y) = convolutional(), images(8)
    model[3].bias.requires_grad_(False)
    found = kfoc.fit(model, [(x, y)], layers=APART)
    assert found.skipped == {"3.bias": "it is frozen (requires_grad is False)"}
    with pytest.raises(ValueError, match=r"layer '3\.bias' cannot be treated: it is frozen"):
        kfoc.fit(model, [(x, y)], layers=["3.bias"])
