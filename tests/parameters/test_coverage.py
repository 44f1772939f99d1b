"""What a curvature says of how much of the model it is about."""

from __future__ import annotations

import json

import torch
from torch import Tensor, nn

import kfoc
from models import convolutional, images


class Mixed(nn.Module):
    """A frozen layer, a raw parameter, a tied one, and a layer with a frozen bias."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(7))
        self.first = nn.Linear(5, 7).requires_grad_(False)
        self.middle = nn.Linear(7, 7)
        self.middle.bias.requires_grad_(False)
        self.one, self.two = nn.Linear(7, 7, bias=False), nn.Linear(7, 7, bias=False)
        self.two.weight = self.one.weight
        self.head = nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.middle(torch.tanh(self.first(x) * self.scale))
        return self.head(self.two(torch.tanh(self.one(x))))


def check_adds_up(curvature: kfoc.Curvature, model: nn.Module) -> None:
    coverage = curvature.coverage
    parameters = list(model.parameters())
    assert coverage.frozen == sum(p.numel() for p in parameters if not p.requires_grad)
    trained = sum(p.numel() for p in parameters if p.requires_grad)
    assert coverage.treated + coverage.skipped == trained
    assert coverage.fraction == coverage.treated / trained
    for layer in coverage.layers:
        assert layer.reason or not (layer.skipped or layer.frozen), layer


def test_all_of_a_plain_model() -> None:
    model, (x, y) = convolutional(), images(6)
    curvature = kfoc.fit(model, [(x, y)])
    check_adds_up(curvature, model)
    assert curvature.coverage.fraction == 1.0
    assert [layer.layer for layer in curvature.coverage.layers] == ["0", "3", "5"]
    assert curvature.coverage.layers[0] == kfoc.LayerCoverage("0", treated=2 * 9 * 4 + 4)


def test_every_class_of_parameter() -> None:
    model = Mixed()
    curvature = kfoc.fit(model, [(torch.randn(4, 5), None)], layers=["middle", "head", "on*"])
    check_adds_up(curvature, model)
    layers = {layer.layer: layer for layer in curvature.coverage.layers}
    assert layers["middle"].treated == 49
    assert layers["middle"].frozen == 7
    assert layers["head"] == kfoc.LayerCoverage("head", treated=24)
    assert layers["first"].frozen == 42
    assert layers[""] == kfoc.LayerCoverage("", skipped=7, reason="not among the layers asked for")
    shared = layers["one"].treated + layers["one"].skipped
    assert shared == 49
    assert layers["two"].treated + layers["two"].skipped == 0
    assert layers["two"].reason
    text = str(curvature.coverage).splitlines()
    assert text[0].split() == ["layer", "treated", "skipped", "frozen", "reason"]
    assert text[1].startswith("(the model)")
    assert f"{curvature.coverage.fraction:.1%} of the trained parameters" in text[-1]


def test_counts_go_through_json() -> None:
    model, x = Mixed(), torch.randn(4, 5)
    curvature = kfoc.fit(model, [(x, None)])
    loaded = {
        name: kfoc.ParameterCount(*count)
        for name, count in json.loads(json.dumps(curvature.counts)).items()
    }
    assert loaded == curvature.counts
    assert loaded["two.weight"].tied_to == "one.weight"
