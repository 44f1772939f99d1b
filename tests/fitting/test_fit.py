"""What always holds of `fit`: the model comes back, bad input is named, results are determined."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import kfoc
from models import Data, batches, convolutional, images


def snapshot(model: nn.Module) -> dict[str, object]:
    hooks = {
        name: [dict(h) for h in (m._forward_hooks, m._forward_pre_hooks, m._backward_hooks)]
        for name, m in model.named_modules()
    }
    return {
        "modes": {n: m.training for n, m in model.named_modules()},
        "requires_grad": {n: p.requires_grad for n, p in model.named_parameters()},
        "hooks": hooks,
        "rng": torch.get_rng_state().tolist(),
    }


class Raises(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        raise RuntimeError("the model's own trouble")


def failing_loader(data: Data) -> Iterator[tuple[Tensor, Tensor]]:
    yield data[0]
    raise RuntimeError("the loader's own trouble")


@pytest.mark.parametrize("trouble", ["none", "model", "loader", "labels"])
def test_model_comes_back_as_it_was(trouble: str) -> None:
    model, (x, y) = convolutional(), images(12)
    model[3].bias.requires_grad_(False)
    model.train()
    model[4].eval()
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    grads = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    values = {k: v.clone() for k, v in model.state_dict().items()}
    data: object = batches(x, y, 4)
    if trouble == "model":
        model.append(Raises())
    if trouble == "loader":
        data = failing_loader(batches(x, y, 4))
    if trouble == "labels":
        data = batches(x, y + 3, 4)
    before = snapshot(model)
    if trouble == "none":
        kfoc.fit(model, data)  # type: ignore[arg-type]
    else:
        with pytest.raises((RuntimeError, ValueError), match=r"own trouble|out of range"):
            kfoc.fit(model, data)  # type: ignore[arg-type]
    assert snapshot(model) == before
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), grads, strict=True))  # type: ignore[arg-type]
    assert all(torch.equal(v, values[k]) for k, v in model.state_dict().items())


def test_dataloader_leaves_the_random_state() -> None:
    model, (x, y) = convolutional(), images(12)
    before = torch.get_rng_state()
    kfoc.fit(model, DataLoader(TensorDataset(x, y), 5, shuffle=True))
    assert torch.equal(torch.get_rng_state(), before)


def test_result_does_not_depend_on_global_random_state_or_grad_mode() -> None:
    model, (x, y) = convolutional(), images(12)
    first = kfoc.fit(model, batches(x, y, 4))
    torch.manual_seed(123)
    with torch.no_grad():
        second = kfoc.fit(model, batches(x, y, 4))
    with torch.inference_mode():
        third = kfoc.fit(model, batches(x.clone(), y.clone(), 4))
    for layer in first:
        assert torch.equal(first[layer].to_dense(), second[layer].to_dense())
        assert torch.equal(first[layer].to_dense(), third[layer].to_dense())
    other = kfoc.fit(model, batches(x, y, 4), seed=1)
    assert not torch.equal(first["0"].to_dense(), other["0"].to_dense())


def test_dropout_is_a_function_of_the_seed() -> None:
    model, (x, y) = convolutional(), images(12)
    model.insert(5, nn.Dropout(0.5))
    first = kfoc.fit(model, [(x, y)], estimator=kfoc.KFAC())
    torch.rand(5)
    second = kfoc.fit(model, [(x, y)], estimator=kfoc.KFAC())
    assert torch.equal(first["6"].to_dense(), second["6"].to_dense())


def test_loader_draws_from_its_own_stream() -> None:
    """The seeding of forward passes does not reach what the loader draws between them."""
    model, (x, y) = convolutional(), images(12)
    drawn = []

    def loader() -> Iterator[tuple[Tensor, Tensor]]:
        for batch in batches(x, y, 4):
            drawn.append(torch.rand(1).item())
            yield batch

    torch.manual_seed(5)
    expected = [torch.rand(1).item() for _ in range(3)]
    torch.manual_seed(5)
    kfoc.fit(model, loader())
    assert drawn == expected


@pytest.mark.parametrize("estimator", [kfoc.BlockDiagonal(), kfoc.KFAC(), kfoc.Diagonal()])
def test_sums_do_not_depend_on_the_batch_size(estimator: kfoc.Estimator) -> None:
    model, (x, y) = convolutional(), images(13)
    fits = [kfoc.fit(model, batches(x, y, size), estimator=estimator) for size in (1, 5, 13)]
    assert {c.num_samples for c in fits} == {13}
    for layer in fits[0]:
        for other in fits[1:]:
            torch.testing.assert_close(fits[0][layer].to_dense(), other[layer].to_dense())


def test_curvature_is_a_mapping() -> None:
    model, (x, y) = convolutional(), images(6)
    curvature = kfoc.fit(model, [(x, y)], layers=["0", "5*"])
    assert list(curvature) == ["0", "5"] == list(curvature.layers)
    assert len(curvature) == 2
    assert "3" not in curvature
    assert curvature.parameters == {"0": ("0.weight", "0.bias"), "5": ("5.weight", "5.bias")}
    assert curvature["0"].shape == (4, 19)
    assert "0: KroneckerBlock 4 x 19" in repr(curvature)
    with pytest.raises(KeyError, match="no block for layer '3'"):
        curvature["3"]


def test_layer_reached_by_some_batches_only() -> None:
    class Sometimes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(4, 3), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.one(x) + (self.two(x) if x[0, 0] > 0 else 0.0)

    model = Sometimes()
    x = torch.randn(8, 4)
    x[:4, 0], x[4:, 0] = -1.0, 1.0
    for order in ([0, 4], [4, 0]):
        data = [(x[k : k + 4], None) for k in order]
        for estimator in (
            *(kfoc.KFOC(), kfoc.KFOC(buffer=0), kfoc.KFOC("exact"), kfoc.KFOC("running")),
            kfoc.BlockDiagonal(),
        ):
            options = {"likelihood": "gaussian", "fisher": "exact", "estimator": estimator}
            both = kfoc.fit(model, data, **options)
            reached = kfoc.fit(model, [(x[4:], None)], **options)
            torch.testing.assert_close(
                both["two"].to_dense(), reached["two"].to_dense() / 2, rtol=1e-5, atol=1e-6
            )


def test_inputs_of_any_structure() -> None:
    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 3)

        def forward(self, x: Tensor, scale: Tensor) -> Tensor:
            return self.layer(x * scale)

    model, x, scale = Sum(), torch.randn(5, 4), torch.rand(5, 1)
    expected = kfoc.fit(model, [({"x": x, "scale": scale}, None)], "gaussian")
    for inputs in ((x, scale), [x, scale]):
        found = kfoc.fit(model, [(inputs, None)], "gaussian")
        assert torch.equal(found["layer"].to_dense(), expected["layer"].to_dense())
    found = kfoc.fit(model, [(7, None)], "gaussian", predict=lambda m, _: m(x, scale))
    assert torch.equal(found["layer"].to_dense(), expected["layer"].to_dense())


def test_half_precision_accumulates_in_float32() -> None:
    model, (x, y) = convolutional(torch.float32), images(12, torch.float32)
    expected = kfoc.fit(model, batches(x, y, 4), fisher="empirical")
    found = kfoc.fit(model.bfloat16(), batches(x.bfloat16(), y, 4), fisher="empirical")
    for layer in expected:
        assert found[layer].to_dense().dtype == torch.float32
        difference = (found[layer].to_dense() - expected[layer].to_dense()).norm()
        assert difference < 0.1 * expected[layer].to_dense().norm()


def test_progress_is_reported(capsys: pytest.CaptureFixture[str]) -> None:
    model, (x, y) = convolutional(), images(12)
    kfoc.fit(model, batches(x, y, 4), progress=True)
    assert "pass 1, batch 3 of 3, 12 samples" in capsys.readouterr().err


def bad(name: str) -> tuple[nn.Module, object, dict]:
    model, (x, y) = convolutional(), images(12)
    data = batches(x, y, 4)
    nan = x.clone()
    nan[5, 0, 0, 0] = torch.nan
    cases: dict[str, tuple[nn.Module, object, dict]] = {
        "empty": (model, [], {}),
        "activation": (model, batches(nan, y, 4), {}),
        "labels": (model, batches(x, y * 2, 4)[::-1], {}),
        "outputs not finite": (nn.Sequential(model, Infinite()), data, {}),
        "label shape": (model, [(x, y[:3])], {}),
        "outputs": (nn.Sequential(model, nn.Flatten(0)), data, {}),
        "no such layer": (model, data, {"layers": ["0", "fc*"]}),
        "likelihood": (model, data, {"likelihood": "poisson"}),
        "fisher": (model, data, {"fisher": "true"}),
        "mc_samples": (model, data, {"mc_samples": 0}),
        "probes": (model, data, {"probes": -1}),
        "estimator": (model, data, {"estimator": kfoc.KFOC}),
        "pairs": (model, [x], {}),
        "iterator": (model, iter(data), {"estimator": kfoc.KFOC("exact")}),
        "batch norm": (nn.Sequential(nn.BatchNorm2d(2), model), data, {}),
        "dictionary": (Dictionary(model), data, {}),
        "integers": (nn.Sequential(nn.Flatten(), nn.Linear(128, 3)), [(x.long(), y)], {}),
        "frozen": (model.requires_grad_(False), data, {})
        if name == "frozen"
        else (model, data, {}),
        "changed input": (ChangedInput(), [(torch.randn(4, 5), None)], {"likelihood": "gaussian"}),
        "gradient": (InfiniteGradient(), [(torch.randn(4, 5), None)], {"likelihood": "gaussian"}),
    }
    return cases[name]


class Dictionary(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"logits": self.inner(x)}


class Infinite(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x / 0


class ChangedInput(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = x * 1
        y = self.layer(x)
        x += 1
        return y


class InfiniteGradient(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        return (self.layer(x) * 0).abs().sqrt()


MESSAGES = {
    "empty": "data has no batches",
    "activation": r"batch 1: layer '0': its input has values not finite \(nan\)",
    "outputs not finite": "batch 0: the model's outputs are not finite",
    "labels": "batch 0: label 4 is out of range for 3 classes",
    "label shape": r"batch 0: labels of shape \(3,\) do not fit",
    "outputs": r"batch 0: 4 inputs gave outputs of shape \(12,\)",
    "no such layer": r"'fc\*' matches no layer with parameters; there are '0', '3', '5'",
    "likelihood": "likelihood must be one of categorical, gaussian, bernoulli",
    "fisher": "fisher must be one of mc, mc-plain, exact, empirical, found 'true'",
    "mc_samples": "mc_samples must be at least 1",
    "probes": "probes must be at least 0, found -1",
    "estimator": "estimator must be an instance",
    "pairs": r"batch 0: data must yield pairs \(inputs, targets\), found a Tensor of 12",
    "iterator": "needs several passes over the data",
    "batch norm": r"layer '0' normalises by the statistics of the batch.*model.eval\(\)",
    "dictionary": "batch 0: the model returned a dict, not a tensor: pass predict=",
    "integers": "batch 0: layer '1': its input is torch.int64, not floating point",
    "frozen": "no layer can be treated.*frozen",
    "changed input": "batch 0: layer 'layer': its input was changed in place",
    "gradient": "batch 0: layer 'layer': its output gradient has values not finite",
}


@pytest.mark.parametrize("name", MESSAGES)
def test_bad_input_is_named(name: str) -> None:
    model, data, options = bad(name)
    with pytest.raises(ValueError, match=MESSAGES[name]):
        kfoc.fit(model, data, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("change", ["shuffled", "shorter", "longer"])
def test_several_passes_need_the_same_data(change: str) -> None:
    model, (x, y) = convolutional(), images(12)
    data = batches(x, y, 4)

    class Changing:
        def __init__(self) -> None:
            self.passes = 0

        def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
            self.passes += 1
            later = {"shuffled": data[::-1], "shorter": data[:2], "longer": [*data, data[0]]}
            return iter(data if self.passes == 1 else later[change])

    with pytest.raises(ValueError, match="several passes need the same batches"):
        kfoc.fit(model, Changing(), estimator=kfoc.KFOC("exact", rtol=0, buffer=0))


class StopError(Exception):
    """At the first backward pass."""


class Wide(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 700)

    def forward(self, x: Tensor) -> Tensor:
        outputs = self.layer(x)
        outputs.register_hook(self.stop)
        return outputs

    def stop(self, grad: Tensor) -> None:
        raise StopError


def test_the_price_of_exact_labels_is_told_before_it_is_paid() -> None:
    data = [(torch.randn(2, 3, 3), None)]
    options: dict = {"fisher": "exact", "verify": False}
    with (
        pytest.warns(RuntimeWarning, match=r"pass for each output .* are 2,100 \(outputs of"),
        pytest.raises(StopError),
    ):
        kfoc.fit(Wide(), data, **options)
    with pytest.raises(StopError):  # and no warning, which were an error here
        kfoc.fit(Wide(), [(torch.randn(2, 2, 3), None)], **options)
