"""Every layer family and option against per-sample gradients by torch.func."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn

import kfoc
import oracle
from every_layer import check_every_block
from kfoc.layers.linear import linear
from models import Dead


class Wrapped(nn.Module):
    """One layer, between a nonlinearity and a flattening, so that it is not the output itself."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.layer(torch.sin(x))).flatten(1)[:, :5]


CONVOLUTIONS = [
    {"stride": 2},
    {"stride": (2, 1), "padding": (1, 2)},
    {"padding": "same"},
    {"padding": "same", "dilation": 2, "kernel_size": (4, 3)},
    {"padding": "same", "kernel_size": (4, 2)},  # an odd pixel to pad
    {"padding": "valid"},
    {"dilation": (1, 2), "padding": 1},
    {"kernel_size": (1, 3), "stride": (1, 2)},
    *(
        {"padding": padding, "padding_mode": mode}
        for mode in ("reflect", "replicate", "circular")
        for padding in ((1, 2), "same")
    ),
    {"stride": 3, "dilation": 2, "padding": 2, "padding_mode": "circular"},
]
WITH_BIAS = list(itertools.product(CONVOLUTIONS, [True, False]))


def check_block(model: nn.Module, layer: str, x: Tensor, **oracle_options: bool) -> None:
    """The exact block and the optimum of one layer, against the oracle, with the exact Fisher."""
    cotangents = oracle.gaussian_exact(model(x).detach())
    expected = oracle.fisher_block(model, layer, x, cotangents, **oracle_options)
    data = [(x, None)]
    options = {"likelihood": "gaussian", "fisher": "exact", "layers": layer}
    exact = kfoc.fit(model, data, estimator=kfoc.BlockDiagonal(), **options)[layer]
    torch.testing.assert_close(exact.to_dense(), expected, rtol=1e-9, atol=1e-10)
    block = kfoc.fit(model, data, estimator=kfoc.KFOC(rtol=0), **options)[layer]
    best, _, error = oracle.optimum(expected, *block.shape)
    assert oracle.relative_error(expected, block.to_dense()) == pytest.approx(error, rel=1e-8)
    torch.testing.assert_close(
        block.to_dense(), best, rtol=1e-6, atol=1e-8 * best.abs().max().item()
    )


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize(("options", "bias"), WITH_BIAS)
def test_conv2d(options: dict, bias: bool) -> None:
    layer = nn.Conv2d(2, 3, **{"kernel_size": 3, **options}, bias=bias)
    check_block(Wrapped(layer), "layer", torch.randn(4, 2, 7, 6))


OTHER_DIMENSIONS = [
    (nn.Conv1d, {"stride": 2, "padding": 1}, (4, 2, 9)),
    (nn.Conv1d, {"padding": "same", "dilation": 2, "padding_mode": "reflect"}, (4, 2, 9)),
    (nn.Conv3d, {"stride": (1, 2, 1), "padding": (1, 0, 1)}, (3, 2, 4, 5, 4)),
    (nn.Conv3d, {"padding": "same", "padding_mode": "circular"}, (3, 2, 3, 4, 3)),
    (nn.ConvTranspose1d, {"stride": 2, "padding": 1, "output_padding": 1}, (4, 2, 5)),
    (nn.ConvTranspose1d, {"stride": 3, "dilation": 2, "padding": 5}, (4, 2, 5)),
    (nn.ConvTranspose2d, {}, (3, 2, 3, 4)),
    (nn.ConvTranspose2d, {"stride": (2, 1), "padding": (1, 2), "dilation": (1, 2)}, (3, 2, 4, 3)),
    (
        nn.ConvTranspose2d,
        {"stride": 2, "output_padding": (1, 0), "kernel_size": (2, 3)},
        (3, 2, 3, 3),
    ),
    (nn.ConvTranspose3d, {"stride": 2, "padding": 1, "output_padding": 1}, (2, 2, 2, 3, 2)),
]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("family", "options", "shape"), OTHER_DIMENSIONS)
def test_convolutions_of_all_kinds(
    family: type[nn.Module], options: dict, shape: tuple[int, ...], bias: bool
) -> None:
    layer = family(2, 3, **{"kernel_size": 3, **options}, bias=bias)
    check_block(Wrapped(layer), "layer", torch.randn(shape))


GROUPED = [
    (nn.Conv1d, 4, 6, 2, (5, 4, 6)),
    (nn.Conv2d, 4, 6, 2, (4, 4, 5, 5)),
    (nn.Conv2d, 4, 4, 4, (4, 4, 5, 5)),  # depthwise
    (nn.Conv2d, 3, 6, 3, (4, 3, 5, 5)),  # depthwise, two outputs a channel
    (nn.Conv3d, 2, 2, 2, (3, 2, 3, 3, 4)),
    (nn.ConvTranspose2d, 4, 6, 2, (3, 4, 3, 3)),
]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("family", "ins", "outs", "groups", "shape"), GROUPED)
def test_grouped_convolutions(
    family: type[nn.Module], ins: int, outs: int, groups: int, shape: tuple[int, ...], bias: bool
) -> None:
    model = Wrapped(family(ins, outs, 3, padding=1, groups=groups, bias=bias))
    x = torch.randn(shape)
    cotangents = oracle.gaussian_exact(model(x).detach())
    expected = oracle.fisher_block(model, "layer", x, cotangents)
    options: dict = {"likelihood": "gaussian", "fisher": "exact", "layers": "layer"}
    data = list(zip(x.split(2), [None] * 9, strict=False))
    exact = kfoc.fit(model, data, estimator=kfoc.BlockDiagonal(), **options)["layer"]
    torch.testing.assert_close(exact.to_dense(), expected, rtol=1e-9, atol=1e-10)
    diagonal = kfoc.fit(model, data, estimator=kfoc.Diagonal(), **options)["layer"]
    torch.testing.assert_close(diagonal.diagonal.flatten(), expected.diagonal())
    block = kfoc.fit(model, data, estimator=kfoc.KFOC("exact", rtol=0), probes=200, **options)[
        "layer"
    ]
    o, i = outs // groups, block.shape[1]
    best = torch.zeros_like(expected)
    for g in range(groups):
        part = slice(g * o * i, (g + 1) * o * i)
        best[part, part] = oracle.optimum(expected[part, part], o, i)[0]
    torch.testing.assert_close(
        block.to_dense(), best, rtol=1e-6, atol=1e-8 * best.abs().max().item()
    )
    error = oracle.relative_error(expected, best)
    assert block.relative_error == pytest.approx(error, abs=4 * block.report.standard_error + 1e-9)
    vectors = torch.randn(2, *block.shape)
    product = vectors.flatten(1) @ block.to_dense()
    torch.testing.assert_close(block.matvec(vectors).flatten(1), product)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("aggregation", ["online", "exact", "running"])
def test_depthwise_convolutions_called_twice_and_not_always(aggregation: str, bias: bool) -> None:
    """All groups at once: several calls, batches that do not reach the layer, tiny gradients."""

    class Tiny(nn.Module):
        def __init__(self, layer: nn.Module) -> None:
            super().__init__()
            self.layer, self.offset = layer, nn.Parameter(torch.randn(4))

        def forward(self, x: Tensor) -> Tensor:
            out = self.layer(torch.tanh(self.layer(x))).flatten(1)[:, ::4]  # of all channels
            return 1e-12 * out + self.offset

    class Sometimes(Tiny):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) if len(x) == 2 else x.flatten(1)[:, ::4] + self.offset

    layer = nn.Conv1d(3, 3, 3, padding=1, groups=3, bias=bias)
    model, x = Sometimes(layer), torch.randn(8, 3, 5)
    x[6:] *= 1e4  # the batches are summed at scales of their own
    reached = x[[3, 4, 6, 7]]
    cotangents = oracle.gaussian_exact(Tiny(layer)(reached).detach())
    expected = oracle.fisher_block(Tiny(layer), "layer", reached, cotangents) * (4 / 8)
    assert all(expected[g * (3 + bias)].any() for g in range(3))
    data = [(part, None) for part in x.split([3, 2, 1, 2])]
    estimator = kfoc.KFOC(aggregation, rtol=0, buffer=0)
    options: dict = {"fisher": "exact", "estimator": estimator}
    block = kfoc.fit(model, data, "gaussian", **options)["layer"]
    i = 3 + bias
    diagonal = torch.block_diag(*[expected[g * i :, g * i :][:i, :i] for g in range(3)])
    scale = expected.abs().max().item()
    torch.testing.assert_close(block.to_dense(), diagonal, rtol=1e-8, atol=1e-10 * scale)
    for one in block.blocks:
        oracle.assert_psd_and_symmetric(one.right)


NORMALISATIONS = {
    "layer": (lambda: nn.LayerNorm(4), (6, 4)),
    "layer, positions": (lambda: nn.LayerNorm(4), (6, 3, 4)),
    "layer, two axes": (lambda: nn.LayerNorm([3, 4]), (6, 3, 4)),
    "layer, no bias": (lambda: nn.LayerNorm(4, bias=False), (6, 3, 4)),
    "rms": (lambda: nn.RMSNorm(4), (6, 3, 4)),
    "group": (lambda: nn.GroupNorm(2, 4), (6, 4, 3, 3)),
    "batch, eval": (lambda: nn.BatchNorm2d(4).eval(), (6, 4, 3, 3)),
    "batch 1d, eval": (lambda: nn.BatchNorm1d(4).eval(), (6, 4)),
}


@pytest.mark.parametrize("name", NORMALISATIONS)
@pytest.mark.parametrize(
    "estimator", [kfoc.KFOC(), kfoc.KFAC(), kfoc.BlockDiagonal(), kfoc.Diagonal()]
)
def test_normalisation_layers_are_exact(name: str, estimator: kfoc.Estimator) -> None:
    build, shape = NORMALISATIONS[name]
    layer = build()
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    if isinstance(layer, nn.modules.batchnorm._BatchNorm):
        layer.running_mean.normal_()
        layer.running_var.uniform_(0.5, 2.0)
    model, x = Wrapped(layer), torch.randn(shape)
    cotangents = oracle.gaussian_exact(model(x).detach())
    gradients = oracle.elementwise_gradients(model, "layer", x, cotangents)
    rows = gradients.flatten(0, 1).flatten(1)
    expected = rows.mT @ rows / len(x)
    data = list(zip(x.split(4), [None] * 2, strict=True))
    block = kfoc.fit(model, data, "gaussian", fisher="exact", estimator=estimator)["layer"]
    if isinstance(estimator, kfoc.Diagonal):
        expected = torch.diag(expected.diagonal())
    torch.testing.assert_close(block.to_dense(), expected)


def test_large_normalisation_layers_get_their_diagonal() -> None:
    model = nn.Sequential(nn.Linear(3, 600), nn.LayerNorm(600), nn.Linear(600, 2))
    curvature = kfoc.fit(model, [(torch.randn(4, 3), None)], "gaussian", probes=4)
    assert isinstance(curvature["1"], kfoc.DiagonalBlock)
    assert curvature["1"].shape == (600, 2)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(6, 4), (6, 3, 4), (6, 2, 3, 4)])
def test_linear_with_any_leading_dimensions(shape: tuple[int, ...], bias: bool) -> None:
    check_block(Wrapped(nn.Linear(4, 3, bias=bias)), "layer", torch.randn(shape))


def test_model_that_is_itself_a_layer() -> None:
    model, x = nn.Linear(3, 2), torch.randn(5, 3)
    curvature = kfoc.fit(model, [(x, None)], "gaussian", fisher="exact")
    assert curvature.layers == ("",)
    assert curvature.parameters[""] == ("weight", "bias")
    assert oracle.relative_error(
        oracle.fisher_block(model, "", x, oracle.gaussian_exact(model(x))),
        curvature[""].to_dense(),
    ) == pytest.approx(0.0, abs=1e-7)


class Inplace(nn.Module):
    """A convolution whose output is overwritten by what follows, as torchvision's models do."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 3, 3)
        self.head = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu_(self.conv(x)).mean((2, 3)))


def test_output_changed_in_place() -> None:
    check_block(Inplace(), "conv", torch.randn(4, 2, 6, 6))


class Twice(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(torch.tanh(self.layer(x))).flatten(1)[:, :4]


@pytest.mark.parametrize(
    ("layer", "shape"),
    [(nn.Linear(4, 4), (5, 4)), (nn.Conv2d(2, 2, 3, stride=1), (4, 2, 7, 7))],
    ids=["linear", "conv"],
)
def test_layer_called_twice(layer: nn.Module, shape: tuple[int, ...]) -> None:
    check_block(Twice(layer.double()), "layer", torch.randn(shape))


def test_frozen_bias_leaves_the_weight_alone() -> None:
    layer = nn.Linear(4, 3)
    layer.bias.requires_grad_(False)
    model = Wrapped(layer)
    check_block(model, "layer", torch.randn(6, 4), bias=False)
    curvature = kfoc.fit(model, [(torch.randn(6, 4), None)], "gaussian")
    assert curvature.parameters["layer"] == ("layer.weight",)


BIAS_ALONE = {
    "linear": (lambda: nn.Linear(4, 3), (6, 2, 4)),
    "conv": (lambda: nn.Conv2d(2, 3, 2, groups=1), (4, 2, 3, 3)),
    "grouped": (lambda: nn.Conv1d(4, 4, 2, groups=2), (4, 4, 3)),
    "transposed": (lambda: nn.ConvTranspose1d(2, 3, 2), (4, 2, 3)),
    "layer norm": (lambda: nn.LayerNorm(4), (5, 3, 4)),
}


@pytest.mark.parametrize("case", BIAS_ALONE)
def test_frozen_weight_leaves_the_bias_alone(case: str) -> None:
    build, shape = BIAS_ALONE[case]
    layer = build()
    layer.weight.requires_grad_(False)
    found = check_every_block(Wrapped(layer), torch.randn(shape))
    assert found.parameters == {"layer": ("layer.bias",)}


class Pairs(nn.Module):
    def __init__(self, bias: bool, swap: bool) -> None:
        super().__init__()
        self.layer, self.swap = nn.Bilinear(3, 2, 4, bias=bias), swap

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        out = self.layer(input2=torch.sin(y), input1=x) if self.swap else self.layer(x, y)
        return torch.tanh(out).flatten(1)[:, :5]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("positions", [(), (2,)])
def test_bilinear(bias: bool, positions: tuple[int, ...]) -> None:
    x, y = torch.randn(5, *positions, 3), torch.randn(5, *positions, 2)
    found = check_every_block(Pairs(bias, bool(positions)), x, y)
    assert found["layer"].shape == (4, 6 + bias)


class Custom(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) ** 2


def tied() -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Linear(4, 2))
    model[2].weight = model[0].weight
    return model


def frozen() -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    model[0].requires_grad_(False)
    return model


def reparametrised() -> nn.Module:
    """By the older function, which leaves a plain tensor in the weight's place."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    layer = model[0]
    layer.weight_direction = nn.Parameter(layer.weight.detach())
    del layer.weight
    layer.register_forward_pre_hook(
        lambda module, args: setattr(module, "weight", torch.tanh(module.weight_direction))
    )
    layer.weight = torch.tanh(layer.weight_direction)
    return model


class WithoutGradient(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Linear(4, 4), nn.Linear(4, 2))

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            x = self[0](x)
        return self[1](x)


class TuplesIn(nn.Sequential):
    """A registered family that gets no tensor here."""

    def __init__(self) -> None:
        super().__init__(PairLinear(4, 4), nn.Linear(4, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self[1](self[0]((x, x)))


class PairLinear(nn.Linear):
    def forward(self, pair: tuple[Tensor, Tensor]) -> Tensor:  # type: ignore[override]
        return super().forward(pair[0] + pair[1])


kfoc.register(PairLinear)(linear)


class Unbatched(nn.Module):
    """A convolution of (C, L) that has as many channels as there are samples."""

    def __init__(self) -> None:
        super().__init__()
        self.add_module("0", nn.Conv1d(3, 3, 3, padding=1))
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.get_submodule("0")(x)))


class Unreached(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Linear(4, 4), nn.Linear(4, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self[1](x)


class InFirst(nn.Module):
    """A linear layer whose weight has its inputs first, as GPT-2's has."""

    def __init__(self, ins: int, outs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(ins, outs))
        self.bias = nn.Parameter(torch.randn(outs))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


def test_a_layer_of_ones_own() -> None:
    model, x = Wrapped(InFirst(4, 3)), torch.randn(5, 2, 4)
    options: dict = {"likelihood": "gaussian", "fisher": "exact"}
    assert kfoc.fit(model, [(x, None)], **options).layouts["layer"].kind == "flat"

    @kfoc.register(InFirst)
    def treat(module: InFirst) -> kfoc.Treatment:
        def inputs(values: Tensor) -> kfoc.Rows:
            rows = values.reshape(len(values), -1, values.shape[-1])
            return kfoc.Rows(rows, constant=1.0)

        def grads(grad: Tensor) -> Tensor:
            return grad.reshape(len(grad), -1, grad.shape[-1])

        return kfoc.Treatment(inputs, grads, ("weight", "bias"), layout="columns")

    found = kfoc.fit(model, [(x, None)], estimator=kfoc.BlockDiagonal(), **options)["layer"]
    same = nn.Linear(4, 3)
    same.load_state_dict({"weight": model.layer.weight.mT, "bias": model.layer.bias})
    twin = Wrapped(same)
    expected = oracle.fisher_block(twin, "layer", x, oracle.gaussian_exact(twin(x).detach()))
    torch.testing.assert_close(found.to_dense(), expected)


class Shared(nn.Sequential):
    """Uses a layer's weight once more, behind its back: half its gradient would be missed."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(4, 4), nn.Linear(4, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self[1](nn.functional.linear(torch.tanh(self[0](x)), self[0].weight))


class SingleRow(nn.Sequential):
    """A layer of what all samples share, such as position embeddings."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(4, 4), nn.Linear(4, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self[1](torch.tanh(x + self[0](torch.ones(1, 4))))


CANNOT = {
    "used outside": (Shared, "0", "its calls do not add up to the gradient of its parameters"),
    "subclass": (
        lambda: nn.Sequential(Custom(4, 4), nn.Linear(4, 2)),
        "0",
        "its calls do not add up to the gradient of its parameters",
    ),
    "tied": (tied, "0", "shares a parameter with '2'"),
    "frozen": (frozen, "0", "its parameters are frozen"),
    "reparametrised": (reparametrised, "0.weight_direction", "not covered by that of '0'"),
    "without gradient": (WithoutGradient, "0", "its output carries no gradient"),
    "no tensor": (TuplesIn, "0", "its input must be a tensor, found tuple"),
    "unbatched": (Unbatched, "0", "its input must have 3 dimensions"),
    "single row": (SingleRow, "0", "its rows mix samples"),
    "unknown": (
        lambda: nn.Sequential(nn.PReLU(4), nn.Linear(4, 2)),
        "0",
        "no treatment for PReLU",
    ),
    "never called": (Unreached, "0", "its forward was never called"),
}


@pytest.mark.parametrize("case", CANNOT)
def test_untreatable_layers_are_skipped_or_refused_by_name(
    case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kfoc.layers.selection.LOOSE_LIMIT", 0)
    build, layer, reason = CANNOT[case]
    model = build()
    x = torch.randn(3, 4)
    curvature = kfoc.fit(model, [(x, None)], "gaussian")
    assert reason in curvature.skipped[layer]
    assert layer not in curvature.layers
    with pytest.raises(KeyError, match="it was skipped"):
        curvature[layer]
    if case == "reparametrised":  # by its layer, of which the bias has a block
        return
    with pytest.raises(ValueError, match=f"layer '{layer}' cannot be treated: .*{reason}"):
        kfoc.fit(model, [(x, None)], "gaussian", layers=[layer, "*"])


def test_layer_out_of_the_outputs_reach_has_a_zero_block() -> None:
    curvature = kfoc.fit(Dead(), [(torch.randn(5, 4), None)] * 2, "gaussian")
    assert not curvature["dead"].to_dense().any()
    assert curvature["used"].to_dense().any()
