"""Faults and bad input: what raises is named, and the model comes back as it was."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import kfoc
import oracle
from kfoc.errors import out_of_memory
from kfoc.estimators import kfac
from kfoc.estimators.kfoc import AGGREGATIONS
from kfoc.estimators.online import Online
from kfoc.samples.base import gradient_chunks
from kfoc.samples.inputs import Rows
from kfoc.samples.linear import Samples
from models import FEW_PASSES, Data, batches, convolutional, images


def state(model: nn.Module) -> dict[str, Any]:
    """All of a model and of the process that a fit has to leave alone."""
    names = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return {
        "modes": [m.training for m in model.modules()],
        "requires_grad": [p.requires_grad for p in model.parameters()],
        "hooks": [[len(getattr(m, name)) for name in names] for m in model.modules()],
        "grads": [None if p.grad is None else p.grad.tolist() for p in model.parameters()],
        "tensors": {key: value.tolist() for key, value in model.state_dict().items()},
        "rng": torch.get_rng_state().tolist(),
        "grad mode": torch.is_grad_enabled(),
    }


class Breaks(nn.Module):
    """Raises on its second call, once the first batch has been taken in."""

    def __init__(self, error: BaseException) -> None:
        super().__init__()
        self.error, self.calls = error, 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        if self.calls == 2:
            raise self.error
        return x


class BreaksBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        raise KeyboardInterrupt


class BackwardBreaks(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return BreaksBackward.apply(x)


def broken_loader(data: Data, error: BaseException) -> Iterator[tuple[Tensor, Tensor]]:
    yield from data[:2]
    raise error


def interrupted(*_: object) -> None:
    raise KeyboardInterrupt


def faulty(where: str, error: BaseException) -> tuple[nn.Module, Any, dict[str, Any]]:
    model, (x, y) = convolutional(), images(12)
    model.insert(1, nn.BatchNorm2d(4).eval())
    model.insert(5, nn.Dropout())
    model.train()
    model[1].eval()
    for parameter in list(model.parameters())[:3]:
        parameter.grad = torch.randn_like(parameter)
    data: Any = batches(x, y, 4)
    options: dict[str, Any] = {}
    if where == "model":
        model.append(Breaks(error))
    elif where == "loader":
        data = broken_loader(data, error)
    elif where == "backward":
        model.append(BackwardBreaks())
    elif where == "progress":
        options["progress"] = interrupted
    elif where == "predict":
        options["predict"] = interrupted
    return model, data, options


class OwnError(ValueError):
    """A user's error, of a class that kfoc raises itself."""


@pytest.mark.parametrize("where", ["model", "loader", "backward", "progress", "predict"])
@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError("disk"), OwnError("own")], ids=repr)
def test_whatever_raises_the_model_comes_back(where: str, error: BaseException) -> None:
    expected = error if where in ("model", "loader") else KeyboardInterrupt()
    model, data, options = faulty(where, error)
    before = state(model)
    with pytest.raises(type(expected)):
        kfoc.fit(model, data, **options)
    assert state(model) == before


ON_CPU = RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes.")
EXHAUSTED = [torch.OutOfMemoryError("CUDA out of memory."), ON_CPU, MemoryError()]


def test_what_counts_as_out_of_memory() -> None:
    assert all(out_of_memory(error) for error in EXHAUSTED)
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**50)
    assert out_of_memory(caught.value)
    assert not out_of_memory(RuntimeError("something else"))
    assert not out_of_memory(ValueError("not enough memory"))


class Tight(Samples):
    """Samples whose gradients can be had by so many at a time."""

    most = 3
    error: BaseException = EXHAUSTED[0]

    def gradients(self, start: int, stop: int) -> Tensor:
        if stop - start > self.most:
            raise self.error
        return super().gradients(start, stop)


@pytest.mark.parametrize("error", EXHAUSTED, ids=lambda e: type(e).__name__)
def test_smaller_chunks_where_memory_runs_out(
    error: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs, grads = Rows(torch.randn(10, 2, 3)), torch.randn(2, 10, 2, 4)
    expected = Samples(inputs, grads).gradients(0, 10)
    tight = Tight(inputs, grads)
    monkeypatch.setattr(Tight, "error", error)
    found = list(gradient_chunks(tight, 2**20))
    assert max(part.shape[1] for part in found) == 3
    assert torch.equal(torch.cat(found, 1), expected)
    monkeypatch.setattr(Tight, "most", 0)
    with pytest.raises(type(error)):
        list(gradient_chunks(tight, 2**20))


def test_a_fit_with_little_memory_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    model, (x, y) = convolutional(), images(12)
    own = Samples.gradients
    estimators = [kfoc.KFOC("exact"), kfoc.BlockDiagonal(), kfoc.Diagonal()]
    options: dict[str, Any] = {"probes": 2, "fisher": "empirical", "layers": "0"}
    expected = [kfoc.fit(model, [(x, y)], estimator=e, **options)["0"] for e in estimators]

    def limited(self: Samples, start: int, stop: int) -> Tensor:
        if stop - start > 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return own(self, start, stop)

    monkeypatch.setattr(Samples, "gradients", limited)
    for estimator, block in zip(estimators, expected, strict=True):
        found = kfoc.fit(model, [(x, y)], estimator=estimator, **options)["0"]
        torch.testing.assert_close(found.to_dense(), block.to_dense())
        assert found.relative_error == pytest.approx(block.relative_error)


def test_a_solve_falls_back_on_a_plan_that_keeps_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, grads = torch.randn(6, 1, 9), torch.randn(1, 6, 1, 8)
    expected = kfoc.nearest_kronecker_of_samples(inputs, grads, plan="primal")

    def exhausted(*_: object) -> Tensor:
        raise EXHAUSTED[0]

    monkeypatch.setattr("kfoc.plans.single.Gram._whole", exhausted)
    found = kfoc.nearest_kronecker_of_samples(inputs, grads)
    assert found.plan == "primal"
    assert torch.equal(found.left, expected.left)
    with pytest.raises(torch.OutOfMemoryError):  # asked for, so not replaced
        kfoc.nearest_kronecker_of_samples(inputs, grads, plan="gram")


@pytest.mark.parametrize("error", EXHAUSTED, ids=lambda e: type(e).__name__)
def test_memory_that_runs_out_in_a_layer_is_named(
    error: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, (x, y) = convolutional(), images(12)
    add = kfac._State.add

    def failing(self: kfac._State, samples: Any, alone: bool) -> None:
        if samples.shape[0] == 6:
            raise error
        add(self, samples, alone)

    monkeypatch.setattr(kfac._State, "add", failing)
    before = state(model)
    message = "batch 0: layer '3': memory ran out: use smaller batches, a smaller memory_limit"
    with pytest.raises(torch.OutOfMemoryError, match=message):
        kfoc.fit(model, batches(x, y, 4), estimator=kfoc.KFAC())
    assert state(model) == before


@pytest.mark.parametrize("step", ["next_pass", "block"])
def test_memory_that_runs_out_after_a_pass_is_named(
    step: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*_: object) -> Any:
        raise EXHAUSTED[0]

    monkeypatch.setattr(Online, step, failing)
    with pytest.raises(torch.OutOfMemoryError, match=r"layer '\d': memory ran out"):
        kfoc.fit(convolutional(), [images(6)])


def test_memory_that_runs_out_in_the_model_is_named() -> None:
    model, (x, y) = convolutional(), images(12)
    model.append(Breaks(EXHAUSTED[0]))
    message = r"batch 1: the forward pass: memory ran out: use smaller batches \(CUDA out"
    with pytest.raises(torch.OutOfMemoryError, match=message):
        kfoc.fit(model, batches(x, y, 4), verify=False)


ESTIMATORS = [
    *(kfoc.KFOC(aggregation) for aggregation in AGGREGATIONS),
    kfoc.KFOC(buffer=0),
    kfoc.KFOC("exact", buffer=0, passes=4),
    kfoc.KFOC(decay=0.9),
    kfoc.KFOC(rank=2),
    kfoc.KFOC("exact", rank=2, buffer=0, passes=4),
    kfoc.KFAC(),
    kfoc.EigenCorrected(),
    kfoc.EigenCorrected(kfoc.KFAC()),
    kfoc.BlockDiagonal(),
    kfoc.Diagonal(),
]


class Scaled(nn.Module):
    """A convolution, a depthwise one, a normalisation, an embedding, a loose scale and a layer."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(2, 2, 2)
        self.depthwise = nn.Conv2d(2, 2, 2, groups=2)
        self.norm = nn.LayerNorm(8)
        self.gain = nn.Parameter(torch.ones(8))
        self.embedding = nn.Embedding(4, 8)
        self.linear = nn.Linear(8, 3)
        self.scale = scale

    def forward(self, x: Tensor, token: Tensor) -> Tensor:
        hidden = self.depthwise(torch.tanh(self.convolution(x))).flatten(1)
        hidden = self.norm(hidden) * self.gain + self.embedding(token)
        return self.linear(torch.tanh(hidden)) * self.scale


def scaled_data(dtype: torch.dtype) -> list[Any]:
    x, tokens, y = torch.randn(8, 2, 4, 4, dtype=dtype), torch.randint(4, (8,)), torch.randn(8, 3)
    parts = zip(x.split(3), tokens.split(3), y.to(dtype).split(3), strict=True)
    return [((a, b), c) for a, b, c in parts]


@pytest.mark.parametrize("scale", [1e-20, 1e-15, 1e15, 1e18])
@pytest.mark.parametrize("estimator", ESTIMATORS, ids=repr)
@FEW_PASSES
def test_gradients_of_any_scale(estimator: kfoc.Estimator, scale: float) -> None:
    """In float32: as in float64, or F itself does not fit float32 and that is said."""
    torch.set_default_dtype(torch.float32)
    model = Scaled(scale)
    data = [((a, b), None) for (a, b), _ in scaled_data(torch.float32)]
    options: dict[str, Any] = {"likelihood": "gaussian", "fisher": "exact", "probes": 4}
    found = kfoc.fit(model, data, estimator=estimator, **options)
    double = [((a.double(), b), None) for (a, b), _ in data]
    expected = kfoc.fit(model.double(), double, estimator=estimator, **options)
    for layer, block in found.items():
        check_close(block, expected[layer])


def check_close(block: kfoc.Block, expected: kfoc.Block) -> None:
    values = block.to(dtype=torch.float64).to_dense()
    assert values.isfinite().all()
    reference = expected.to_dense()
    assert (values - reference).norm() <= 5e-3 * reference.norm()
    assert block.relative_error == pytest.approx(expected.relative_error, abs=5e-3)


class ScaledByInput(nn.Module):
    """The first input, an amplitude, scales the outputs: gradients of any scale in one data set."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution, self.linear = nn.Conv1d(1, 2, 2), nn.Linear(6, 2)

    def forward(self, x: Tensor, amplitude: Tensor) -> Tensor:
        return self.linear(torch.tanh(self.convolution(x)).flatten(1)) * amplitude


@pytest.mark.parametrize("scales", [(1e-15, 1.0, 1e10), (1e10, 1.0, 1e-15), (0.0, 1e-15, 1e-12)])
@pytest.mark.parametrize("estimator", ESTIMATORS, ids=repr)
@FEW_PASSES
def test_batches_of_very_different_scales(
    estimator: kfoc.Estimator, scales: tuple[float, ...]
) -> None:
    torch.set_default_dtype(torch.float32)
    model, x = ScaledByInput(), torch.randn(9, 1, 4)
    amplitudes = [torch.full((3, 1), scale) for scale in scales]
    data = [((part, a), None) for part, a in zip(x.split(3), amplitudes, strict=True)]
    options: dict[str, Any] = {"likelihood": "gaussian", "fisher": "exact", "probes": 4}
    found = kfoc.fit(model, data, estimator=estimator, **options)
    double = [((part.double(), a.double()), None) for (part, a), _ in data]
    expected = kfoc.fit(model.double(), double, estimator=estimator, **options)
    for layer, block in found.items():
        check_close(block, expected[layer])


def linear_fit(x: Tensor, amplitude: Tensor, estimator: kfoc.Estimator) -> kfoc.Curvature:
    class Amplified(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 2, bias=False)

        def forward(self, x: Tensor, amplitude: Tensor) -> Tensor:
            return self.layer(x) * amplitude

    torch.manual_seed(0)
    model = Amplified().to(x.dtype)
    data = [((a, b), None) for a, b in zip(x.split(4), amplitude.split(4), strict=True)]
    return kfoc.fit(model, data, "gaussian", fisher="exact", estimator=estimator)


@pytest.mark.parametrize("scale", [1e-25, 1e25])
@pytest.mark.parametrize("estimator", [e for e in ESTIMATORS if "KFAC" not in repr(e)], ids=repr)
def test_inputs_and_gradients_of_opposite_scales(estimator: kfoc.Estimator, scale: float) -> None:
    """Neither squares to a float32, and F is of ordinary size."""
    x, amplitude = torch.randn(8, 3), torch.rand(8, 1) + 0.5
    expected = linear_fit(x, amplitude, estimator)["layer"].to_dense()
    single = (x * scale).float(), (amplitude / scale).float()
    found = linear_fit(*single, estimator)["layer"].to_dense().double()
    assert (found - expected).norm() <= 1e-3 * expected.norm()


def test_blocks_beyond_the_range_of_their_dtype_are_refused() -> None:
    x = torch.randn(8, 3).float()
    with pytest.raises(ValueError, match=r"layer 'layer': its block has numbers beyond the range"):
        linear_fit(x, torch.full((8, 1), 1e25).float(), kfoc.BlockDiagonal())
    with pytest.raises(ValueError, match=r"of torch\.float32: .*model\.double\(\)"):
        linear_fit(x * 1e25, torch.full((8, 1), 1e-25).float(), kfoc.KFAC())


def zero_model() -> nn.Sequential:
    model = convolutional()
    nn.init.zeros_(model[5].weight)
    return model


def without_gradient() -> dict[str, tuple[nn.Module, list[Any], dict[str, Any]]]:
    """Fits whose every gradient is zero, by one reason or another."""
    model, (x, y) = convolutional(), images(6)
    perfect = [(part, model(part).detach()) for part in x.split(4)]
    certain = convolutional()
    certain[5].bias.data[0] = 2000.0
    return {
        "labels ignored": (model, batches(x, y * 0 - 100, 4), {"fisher": "exact"}),
        "labels ignored, empirical": (model, batches(x, y * 0 - 100, 4), {"fisher": "empirical"}),
        "labels ignored, drawn": (model, batches(x, y * 0 - 100, 6), {}),
        "perfect": (model, perfect, {"likelihood": "gaussian", "fisher": "empirical"}),
        "certain": (certain, batches(x, y, 4), {"fisher": "exact"}),
    }


@pytest.mark.parametrize("reason", without_gradient())
@pytest.mark.parametrize("estimator", ESTIMATORS, ids=repr)
def test_no_gradient_gives_zero_blocks(estimator: kfoc.Estimator, reason: str) -> None:
    model, data, options = without_gradient()[reason]
    before = state(model)
    found = kfoc.fit(model, data, estimator=estimator, probes=2, **options)
    assert state(model) == before
    for layer, block in found.items():
        if not isinstance(estimator, kfoc.KFAC):  # whose inputs are not zero
            assert all(not torch.isnan(tensor).any() for tensor in block.tensors())
        assert not block.to_dense().any(), layer
        assert block.relative_error == 0
    v = {name: torch.randn_like(p) for name, p in model.named_parameters()}
    for name, value in found.solve(v, damping=0.5).items():
        torch.testing.assert_close(value, 2 * v[name])


@pytest.mark.parametrize("estimator", ESTIMATORS, ids=repr)
def test_zero_inputs_leave_the_bias(estimator: kfoc.Estimator) -> None:
    """And outputs that are the same for every sample."""
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    data = [(torch.zeros(3, 3), None)] * 2
    options: dict[str, Any] = {"likelihood": "gaussian", "fisher": "exact", "probes": 8}
    found = kfoc.fit(model, data, estimator=estimator, **options)
    exact = kfoc.fit(model, data, estimator=kfoc.BlockDiagonal(), **options)
    expected = exact["0"].to_dense()
    if isinstance(estimator, kfoc.Diagonal):
        expected = expected.diagonal().diag()
    # F = left (x) e e^T is a Kronecker product, with its eigenvectors.
    torch.testing.assert_close(found["0"].to_dense(), expected)


@pytest.mark.parametrize("estimator", ESTIMATORS, ids=repr)
@pytest.mark.parametrize("size", [1, 4])
@FEW_PASSES
def test_copies_of_one_sample_count_as_one(estimator: kfoc.Estimator, size: int) -> None:
    if estimator == kfoc.EigenCorrected(kfoc.KFOC()):  # whose basis is as near as sigma's root
        estimator = kfoc.EigenCorrected(kfoc.KFOC(rtol=1e-9))
    model, (x, _) = convolutional(), images(1)
    one = [(x, None)]
    many = [(x.expand(size, -1, -1, -1), None)] * (4 // size)
    options: dict[str, Any] = {"fisher": "exact", "estimator": estimator}
    expected, found = kfoc.fit(model, one, **options), kfoc.fit(model, many, **options)
    exact = kfoc.fit(model, one, fisher="exact", estimator=kfoc.BlockDiagonal())
    for layer, block in found.items():
        fisher = exact[layer].to_dense()
        errors = [oracle.relative_error(fisher, b.to_dense()) for b in (block, expected[layer])]
        assert errors[0] == pytest.approx(errors[1], abs=1e-2)


def test_layers_of_one_input_and_one_output() -> None:
    model = nn.Sequential(nn.Linear(1, 1, bias=False), nn.Tanh(), nn.Linear(1, 1, bias=False))
    x = torch.randn(1, 1)
    for estimator in ESTIMATORS:
        found = kfoc.fit(model, [(x, None)], "gaussian", fisher="exact", estimator=estimator)
        expected = torch.tanh(model[0](x)).square().item()
        assert found["2"].to_dense().item() == pytest.approx(expected)


def test_sequences_without_any_position() -> None:
    class Summed(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return self[1](self[0](x).sum(1))

    model = Summed(nn.Linear(3, 4), nn.Linear(4, 2))
    for estimator in ESTIMATORS:
        found = kfoc.fit(model, [(torch.randn(3, 0, 3), None)] * 2, "gaussian", estimator=estimator)
        assert not found["0"].to_dense().any()
        assert found["1"].to_dense().any()


def test_ties_have_an_optimum() -> None:
    """sigma_1 = sigma_2: any mixture is as good, and the iteration must settle on one."""
    inputs = torch.eye(3)[:, None]  # one position each
    grads = torch.eye(3)[None, :, None]
    for plan in ("gram", "primal", "dense", "gradients", "positions", "position_gram"):
        fit = kfoc.nearest_kronecker_of_samples(inputs, grads, plan=plan, rtol=0)
        assert fit.converged
        assert fit.relative_error == pytest.approx(math.sqrt(2 / 3))
        oracle.assert_psd_and_symmetric(fit.left)
