"""Parameters that no layer rule covers: exact by per-sample gradients."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrizations

import kfoc
import oracle
from every_layer import check_every_block


class Vision(nn.Module):
    """What vision transformers have outside of their layers."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(3, 4), nn.Linear(4, 3)
        self.cls_token = nn.Parameter(torch.randn(1, 1, 4))
        self.positions = nn.Parameter(torch.randn(1, 4, 4))
        self.scale = nn.Parameter(torch.randn(4))
        self.temperature = nn.Parameter(torch.tensor(0.3))

    def forward(self, x: Tensor) -> Tensor:
        tokens = torch.cat([self.cls_token.expand(len(x), -1, -1), self.embed(x)], 1)
        tokens = tokens + self.positions
        tokens = tokens + self.scale * torch.tanh(tokens.roll(1, 1))
        return self.head(tokens[:, 0]) * self.temperature.exp()


class Positions(nn.Module):
    """Position embeddings of a single row, broadcast over the samples, and a layer on such."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.mix, self.head = nn.Embedding(3, 4), nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        positions = self.mix(self.table(torch.arange(3)[None]))
        return self.head(torch.tanh(x + positions)).sum(1)


class Table(nn.Module):
    """As many rows as samples, and an operation on them before any sample is met."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Parameter(torch.randn(3, 4)), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(x @ torch.sin(self.table).mT @ self.table))


class Twice(nn.Module):
    """One slope used at two depths."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.act = nn.Linear(4, 4), nn.Linear(4, 2), nn.PReLU(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.act(self.first(self.act(x))))


class Mixed(nn.Module):
    """Products and sums of parameters with each other, and one that is written in place."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.randn(4)), nn.Parameter(torch.randn(1, 4))
        self.c, self.unused = nn.Parameter(torch.randn(2)), nn.Parameter(torch.randn(2))

    def forward(self, x: Tensor) -> Tensor:
        y = x * 1
        y[:, :2] += self.c
        y = torch.add(y, self.a * self.b, alpha=2) * self.b
        z = torch.add(torch.sin(y), self.a, alpha=0.5)
        return torch.tanh(z) @ torch.outer(self.c, self.a).mT


class Double(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, p: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.save_for_backward(x, p)
        return x * p**2

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[no-untyped-def]
        x, p = ctx.saved_tensors
        return grad * p**2, (2 * grad * x * p).sum(0)


class CustomFunction(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.p, self.head = nn.Parameter(torch.randn(4)), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(Double.apply(x, self.p)))


class Recurrent(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer, self.head = layer, nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        if not self.layer.batch_first:
            return self.head(self.layer(x.transpose(0, 1))[0][-1][:, :4])
        return self.head(self.layer(x)[0][:, -1, :4])


class Cell(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell, self.head = nn.GRUCell(4, 3), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        state = x.new_zeros(len(x), 3)
        for step in x.unbind(1):
            state = self.cell(step, state)
        return self.head(state)


def tied(bias: bool) -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 4, bias), nn.Tanh(), nn.Linear(4, 4, bias), nn.Linear(4, 2))
    model[2].weight = model[0].weight
    return model


def tied_convolutions() -> nn.Module:
    """The same parameters in two layers with different strides."""
    first, second = nn.Conv1d(2, 2, 2), nn.Conv1d(2, 2, 2, stride=2)
    second.weight, second.bias = first.weight, first.bias
    return nn.Sequential(first, nn.Tanh(), second, nn.Flatten(), nn.Linear(4, 2))


class Outside(nn.Sequential):
    """Uses a layer's weight once more, behind its back."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(4, 4), nn.Linear(4, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self[1](functional.linear(torch.tanh(self[0](x)), self[0].weight))


class SequenceFirst(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Linear(4, 4), nn.Linear(4, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self[1](torch.tanh(self[0](x.transpose(0, 1))).mean(0))


class LowRank(nn.Module):
    """A frozen linear layer with a trained product of two matrices beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(4, 4).requires_grad_(False)
        self.a, self.b = nn.Parameter(torch.randn(2, 4)), nn.Parameter(torch.randn(4, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + x @ self.a.mT @ self.b.mT


def low_rank_of_layers() -> nn.Module:
    class Layers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.base = nn.Linear(4, 4).requires_grad_(False)
            self.a, self.b = nn.Linear(4, 2, bias=False), nn.Linear(2, 4, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.base(x) + self.b(self.a(x))

    return nn.Sequential(Layers(), nn.Tanh(), nn.Linear(4, 2))


def parametrised(change: Callable[[nn.Module], nn.Module]) -> nn.Module:
    return nn.Sequential(change(nn.Linear(4, 4)), nn.Tanh(), nn.Linear(4, 2)).eval()


def unbatched_twin() -> nn.Module:
    class Unbatched(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.head = nn.Conv1d(5, 5, 3, padding=1), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:  # as (C, L) with as many channels as samples
            return self.head(x[:, 0] + torch.tanh(self.conv(torch.ones(5, 4)).sum(0)))

    return Unbatched()


# model, shape of a sample, blocks that are to be "flat", parameters without a block
CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], set[str], set[str]]] = {
    "vision": (Vision, (3, 3), {""}, set()),
    "positions": (Positions, (3, 4), {"table", "mix"}, set()),
    "table": (Table, (4,), {""}, set()),
    "twice": (Twice, (4,), {"act"}, set()),
    "mixed": (Mixed, (4,), {""}, set()),
    "custom function": (CustomFunction, (4,), {""}, set()),
    "lstm": (lambda: Recurrent(nn.LSTM(4, 4, batch_first=True)), (3, 4), {"layer"}, set()),
    "lstm, steps first": (lambda: Recurrent(nn.LSTM(4, 4)), (5, 4), {"layer"}, set()),
    "lstm, as many": (lambda: Recurrent(nn.LSTM(4, 4)), (3, 4), {"layer"}, set()),
    "gru": (
        lambda: Recurrent(nn.GRU(4, 2, 2, bidirectional=True, batch_first=True)),
        (3, 4),
        {"layer"},
        set(),
    ),
    "rnn": (lambda: Recurrent(nn.RNN(4, 4)), (3, 4), {"layer"}, set()),
    "cell": (Cell, (3, 4), {"cell"}, set()),
    "tied": (lambda: tied(False), (4,), set(), set()),
    "tied convolutions": (tied_convolutions, (2, 6), set(), set()),
    "tied, own biases": (lambda: tied(True), (4,), {"0", "2"}, set()),
    "used outside": (Outside, (4,), {"0"}, set()),
    "sequence first": (SequenceFirst, (4, 4), set(), set()),
    "sequence first, as many": (SequenceFirst, (3, 4), set(), set()),
    "low rank": (
        lambda: nn.Sequential(LowRank(), nn.Tanh(), nn.Linear(4, 2)),
        (4,),
        {"0"},
        set(),
    ),
    "low rank of layers": (low_rank_of_layers, (4,), set(), set()),
    "weight norm": (
        lambda: parametrised(parametrizations.weight_norm),
        (4,),
        {"0.parametrizations.weight"},
        set(),
    ),
    "spectral norm": (
        lambda: parametrised(parametrizations.spectral_norm),
        (4,),
        {"0.parametrizations.weight"},
        set(),
    ),
    "orthogonal": (
        lambda: parametrised(parametrizations.orthogonal),
        (4,),
        {"0.parametrizations.weight"},
        set(),
    ),
    "unbatched": (unbatched_twin, (2, 4), {"conv"}, set()),
}


@pytest.mark.parametrize("case", CASES)
def test_exact_sample_by_sample(case: str) -> None:
    build, shape, flat, skipped = CASES[case]
    found = check_every_block(build(), torch.randn(5, *shape), skipped=frozenset(skipped))
    assert {name for name in found if found.layouts[name].kind == "flat"} == flat


def test_layers_with_the_same_parameters_are_one() -> None:
    model, x = tied_convolutions(), torch.randn(5, 2, 6)
    found = check_every_block(model, x)
    assert found.layers == ("0", "4")
    assert found.skipped == {"2": "its parameters are in the block of '0'"}
    both = kfoc.fit(model, [(x, None)], "gaussian", layers=["2", "0"])
    assert both.layers == ("0",)
    alone = kfoc.fit(model, [(x, None)], "gaussian", layers=["2"])
    torch.testing.assert_close(alone["2"].to_dense(), both["0"].to_dense())


def test_exact_fisher_of_a_classifier_with_several_directions() -> None:
    model, x = Vision(), torch.randn(5, 3, 3)
    names = ("cls_token", "positions", "scale", "temperature")
    gradients = oracle.gradients_alone(model, names, (x,), oracle.categorical_exact(model(x)))
    expected = oracle.fisher_of([g.detach() for g in gradients], "flat")
    data = [(part, None) for part in x.split([1, 3, 1])]
    found = kfoc.fit(model, data, fisher="exact", estimator=kfoc.BlockDiagonal())
    assert found.parameters[""] == names
    torch.testing.assert_close(found[""].to_dense(), expected)


def test_too_many_parameters_are_skipped_or_refused_by_name(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("kfoc.layers.selection.LOOSE_LIMIT", 24)
    model, data = Vision(), [(torch.randn(5, 3, 3), None)]
    found = kfoc.fit(model, data, "gaussian")
    assert found.layers == ("embed", "head")
    assert "25 parameters are too many" in found.skipped[""]
    with pytest.raises(ValueError, match=r"layer '' cannot be treated: .*too many"):
        kfoc.fit(model, data, "gaussian", layers=["", "head"])


def test_too_many_directions_are_skipped_at_first_and_an_error_later(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("kfoc.model.uncovered.NUMBERS_LIMIT", 3 * 3 * 25)
    model, x = Vision(), torch.randn(7, 3, 3)
    found = kfoc.fit(model, [(x[:4], None), (x[4:], None)], fisher="exact")
    assert "3 per-sample gradients for each of 4 samples" in found.skipped[""]
    with pytest.raises(ValueError, match="batch 1: layer '': its 25 parameters have 3"):
        kfoc.fit(model, [(x[:3], None), (x[3:], None)], fisher="exact")


def test_a_treatment_of_a_part_leaves_the_rest() -> None:
    class Scaled(nn.Linear):
        def __init__(self) -> None:
            super().__init__(4, 4)
            self.scale = nn.Parameter(torch.randn(4))

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x * self.scale)

    @kfoc.register(Scaled)
    def treat(module: Scaled) -> kfoc.Treatment:
        def inputs(values: Tensor) -> kfoc.Rows:
            rows = (values * module.scale.detach()).reshape(len(values), -1, 4)
            return kfoc.Rows(torch.cat([rows, torch.ones_like(rows[..., :1])], -1))

        def grads(grad: Tensor) -> Tensor:
            return grad.reshape(len(grad), -1, 4)

        return kfoc.Treatment(inputs, grads, ("weight", "bias"))

    model = nn.Sequential(Scaled(), nn.Tanh(), nn.Linear(4, 2))
    found = check_every_block(model, torch.randn(5, 4))
    assert set(found) == {"0", "0.scale", "2"}


def test_a_tensor_hook_that_changes_gradients_is_found() -> None:
    class Hooked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.p, self.head = nn.Parameter(torch.randn(4)), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            scale = torch.sin(self.p)
            scale.register_hook(torch.sign)
            return self.head(torch.tanh(x * scale))

    found = kfoc.fit(Hooked(), [(torch.randn(5, 4), None)] * 2, "gaussian")
    assert found.layers == ("head",)
    assert "do not add up" in found.skipped[""]


def test_parameters_that_reach_no_output() -> None:
    model = Mixed()
    model.unused_layer = nn.PReLU()
    found = kfoc.fit(model, [(torch.randn(5, 4), None)], "gaussian")
    assert found.skipped == {"unused_layer": "no output depends on it"}


def test_a_layer_first_reached_later() -> None:
    """Its gradients are zero before, also where it gets no treatment."""

    class Sometimes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.act, self.head = nn.PReLU(4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.act(x) if len(x) == 3 else x)

    model, x = Sometimes(), torch.randn(5, 4)
    options: dict = {"fisher": "exact", "estimator": kfoc.BlockDiagonal()}
    found = kfoc.fit(model, [(x[:2], None), (x[2:], None)], "gaussian", **options)
    alone = kfoc.fit(model, [(x[2:], None)], "gaussian", **options)
    torch.testing.assert_close(found["act"].to_dense(), alone["act"].to_dense() * 3 / 5)


@pytest.mark.parametrize("how", ["half", "autocast"])
def test_half_precision_is_accumulated_in_single(how: str) -> None:
    model, x = Vision().float(), torch.randn(5, 3, 3, dtype=torch.float32)
    options: dict = {"fisher": "exact", "estimator": kfoc.BlockDiagonal()}
    expected = kfoc.fit(model, [(x, None)], "gaussian", **options)[""].to_dense()
    if how == "half":
        model, x = model.bfloat16(), x.bfloat16()
    else:

        def predict(model: nn.Module, x: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                return model(x)

        options["predict"] = predict
    found = kfoc.fit(model, [(x, None)], "gaussian", **options)[""].to_dense()
    assert found.dtype == torch.float32
    assert oracle.relative_error(expected, found) < 0.05


def test_uses_are_counted_under_autocast() -> None:
    """It casts a weight once for all uses."""

    class Twofold(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.head = nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.layer(torch.tanh(self.layer(x))))

    def predict(model: nn.Module, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return model(x)

    options: dict = {"fisher": "exact", "estimator": kfoc.BlockDiagonal(), "predict": predict}
    for model, layer, kind in ((Outside(), "0", "flat"), (Twofold(), "layer", "rows")):
        x = torch.randn(5, 4, dtype=torch.float32)
        model.float()
        found = kfoc.fit(model, [(x, None)], "gaussian", **options)
        assert found.layouts[layer].kind == kind
        names = found.parameters[layer]
        cotangents = oracle.gaussian_exact(model(x)).float()
        gradients = oracle.gradients_alone(model, names, (x,), cotangents)
        expected = oracle.fisher_of(gradients, kind)
        assert oracle.relative_error(expected, found[layer].to_dense()) < 0.05


def test_gradients_that_are_not_finite_are_named() -> None:
    class Infinite(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.p = nn.Parameter(torch.zeros(4))

        def forward(self, x: Tensor) -> Tensor:
            return x + (self.p * x).abs().sqrt()

    with pytest.raises(ValueError, match="layer '': its output gradient has values not finite"):
        kfoc.fit(Infinite(), [(torch.randn(5, 4), None)], "gaussian")
