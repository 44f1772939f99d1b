"""The curvature of a stream, against one pass of `fit` and against dense weighted sums."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import kfoc
import oracle
from models import Data, batches, convolutional, images

ONE_PASS = {
    "kfoc": kfoc.KFOC(),
    "kfoc-streamed": kfoc.KFOC(buffer=0),
    "kfoc-running": kfoc.KFOC("running"),
    "kfoc-approx": kfoc.KFOC("approx"),
    "kfac": kfoc.KFAC(),
    "diagonal": kfoc.Diagonal(),
    "block-diagonal": kfoc.BlockDiagonal(),
}


def data(count: int = 24, size: int = 8) -> Data:
    return batches(*images(count), size)


def assert_same(found: kfoc.Curvature, expected: kfoc.Curvature, rtol: float = 1e-10) -> None:
    assert found.layers == expected.layers
    for layer, block in expected.items():
        dense = block.to_dense()
        tolerance = {"rtol": 0.0, "atol": rtol * dense.abs().max().item()}
        torch.testing.assert_close(found[layer].to_dense(), dense, **tolerance)


@pytest.mark.parametrize("name", ONE_PASS)
@pytest.mark.parametrize("fisher", ["mc", "exact"])
def test_a_stream_is_one_pass_however_often_it_is_asked(name: str, fisher: str) -> None:
    model, stream = convolutional(), data()
    tracker = kfoc.Tracker(model, estimator=ONE_PASS[name], fisher=fisher)
    for inputs, targets in stream:
        tracker.update(inputs, targets)
        first, second = tracker.curvature(), tracker.curvature()
        assert_same(first, second, rtol=0.0)
    found, expected = (
        tracker.curvature(),
        kfoc.fit(model, stream, estimator=ONE_PASS[name], fisher=fisher),
    )
    assert_same(found, expected)
    assert found.num_samples == expected.num_samples == 24


def weighted_fisher(model: nn.Module, layer: str, stream: Data, decay: float) -> Tensor:
    """The mean of the batches' exact blocks, by samples, and earlier ones less."""
    total, weight = 0.0, 0.0
    for inputs, _ in stream:
        block = oracle.fisher_block(model, layer, inputs, oracle.categorical_exact(model(inputs)))
        total = decay * total + len(inputs) * block
        weight = decay * weight + len(inputs)
    assert isinstance(total, Tensor)
    return total.detach() / weight


def test_decay_weighs_exact_blocks() -> None:
    model, stream = convolutional(), data()
    for estimator in (kfoc.BlockDiagonal(), kfoc.Diagonal()):
        tracker = kfoc.Tracker(model, estimator=estimator, decay=0.7, fisher="exact")
        for inputs, _ in stream:
            tracker.update(inputs)
        found = tracker.curvature()
        assert found.num_samples == round(8 * (1 + 0.7 + 0.49))
        for layer, block in found.items():
            expected = weighted_fisher(model, layer, stream, 0.7)
            torch.testing.assert_close(
                block.diagonal_in(None, None).flatten(), expected.diagonal(), rtol=1e-10, atol=1e-14
            )
    found = kfoc.Tracker(model, estimator=kfoc.BlockDiagonal(), decay=0.7, fisher="exact")
    for inputs, _ in stream:
        found.update(inputs)
    for layer, block in found.curvature().items():
        expected = weighted_fisher(model, layer, stream, 0.7)
        torch.testing.assert_close(block.to_dense(), expected, rtol=1e-10, atol=1e-14)


def test_decay_weighs_the_factors_of_kfac() -> None:
    model, stream = convolutional(), data()
    tracker = kfoc.Tracker(model, estimator=kfoc.KFAC(), decay=0.5, fisher="exact")
    left, right, weight = torch.zeros(6, 6), torch.zeros(65, 65), 0.0
    for inputs, _ in stream:
        tracker.update(inputs)
        hidden = model[:3](inputs).detach()
        hidden = torch.cat([hidden, torch.ones(len(hidden), 1)], 1)
        output = model[3](model[:3](inputs)).detach().requires_grad_()
        logits = model[4:](output)
        grads = [
            torch.autograd.grad(logits, output, c, retain_graph=True)[0]
            for c in oracle.categorical_exact(logits.detach())
        ]
        left = 0.5 * left + sum(g.mT @ g for g in grads)
        right = 0.5 * right + hidden.mT @ hidden
        weight = 0.5 * weight + len(inputs)
    block = tracker.curvature()["3"]
    torch.testing.assert_close(block.to_dense(), torch.kron(left, right) / weight**2)


@pytest.mark.parametrize("buffer", [0, 2**19])
def test_decay_of_kfoc_is_that_of_fit(buffer: int) -> None:
    model, stream = convolutional(), data()
    tracker = kfoc.Tracker(model, estimator=kfoc.KFOC(buffer=buffer), decay=0.7)
    same = kfoc.Tracker(model, estimator=kfoc.KFOC(buffer=buffer, decay=0.7))
    for inputs, targets in stream:
        tracker.update(inputs, targets)
        same.update(inputs, targets)
        tracker.curvature()
    expected = kfoc.fit(model, stream, estimator=kfoc.KFOC(buffer=buffer, decay=0.7))
    assert_same(tracker.curvature(), expected)
    assert_same(same.curvature(), expected)


@pytest.mark.parametrize("name", ["kfoc-running", "kfoc-approx"])
def test_decay_of_the_papers_aggregations(name: str) -> None:
    """Batches that are all alike have the same curvature, however they are weighted."""
    model, (x, _) = convolutional(), images(8)
    tracker = kfoc.Tracker(model, estimator=ONE_PASS[name], decay=0.6, fisher="exact")
    for _ in range(3):
        tracker.update(x)
    assert_same(tracker.curvature(), kfoc.fit(model, [(x, None)], fisher="exact"), rtol=1e-5)


def test_decay_weighs_what_running_merges() -> None:
    model, stream = convolutional(), data(16, 8)
    tracker = kfoc.Tracker(model, estimator=kfoc.KFOC("running", rtol=0), decay=0.3, fisher="exact")
    total = torch.zeros(())
    for inputs, _ in stream:
        tracker.update(inputs)
        cotangents = oracle.categorical_exact(model(inputs).detach())
        best, _, _ = oracle.optimum(oracle.fisher_block(model, "3", inputs, cotangents), 6, 65)
        total = 0.3 * total + best
    expected, _, _ = oracle.optimum(total / 1.3, 6, 65)
    torch.testing.assert_close(tracker.curvature()["3"].to_dense(), expected, rtol=1e-6, atol=1e-9)


class Branching(nn.Module):
    """A layer that only some batches reach."""

    def __init__(self) -> None:
        super().__init__()
        self.always, self.rarely = nn.Linear(4, 3), nn.Linear(3, 3)
        self.taken = False

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.always(x)
        return self.rarely(hidden) if self.taken else hidden


@pytest.mark.parametrize(
    "estimator", [kfoc.BlockDiagonal(), kfoc.KFAC(), kfoc.KFOC(buffer=0)], ids=str
)
def test_a_layer_reached_late_counts_the_batches_before_as_zero(estimator: kfoc.Estimator) -> None:
    model, x = Branching(), torch.randn(12, 4)
    tracker = kfoc.Tracker(model, "gaussian", estimator=estimator, decay=0.5, fisher="exact")
    tracker.update(x[:4])
    assert "never called" in tracker.curvature().skipped["rarely"]
    tracker.update(x[4:8])
    model.taken = True
    tracker.update(x[8:])
    found = tracker.curvature()["rarely"].trace()
    alone = kfoc.fit(model, [(x[8:], None)], "gaussian", estimator=estimator, fisher="exact")
    share = 4 / (4 + 2 + 1)
    # K-FAC averages both factors over all samples, so that zeros count twice.
    share = share**2 if isinstance(estimator, kfoc.KFAC) else share
    assert found == pytest.approx(alone["rarely"].trace() * share, rel=1e-6)


def normalised() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.2), nn.Flatten(),
        nn.Linear(144, 3),
    )  # fmt: skip


def test_the_model_is_left_as_it_was() -> None:
    model, (x, y) = normalised().train(), images(8)
    nn.functional.cross_entropy(model(x), y).backward()
    gradients = [parameter.grad.clone() for parameter in model.parameters()]  # type: ignore
    buffers = [buffer.clone() for buffer in model.buffers()]
    random = torch.get_rng_state()
    tracker = kfoc.Tracker(model)
    tracker.update(x, y)
    tracker.curvature()
    assert torch.equal(torch.get_rng_state(), random)
    assert all(module.training for module in model.modules())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        assert torch.equal(parameter.grad, gradient)
    for buffer, value in zip(model.buffers(), buffers, strict=True):
        assert torch.equal(buffer, value)


def test_batch_norm_in_train_mode_is_run_by_its_running_statistics() -> None:
    model, (x, _) = normalised(), images(8)
    model[3] = nn.Identity()
    model.train()(x)
    tracker = kfoc.Tracker(model, estimator=kfoc.KFAC(), fisher="exact")
    tracker.update(x)
    expected = kfoc.fit(model.eval(), [(x, None)], estimator=kfoc.KFAC(), fisher="exact")
    assert_same(tracker.curvature(), expected)


@pytest.mark.parametrize("decay", [1.0, 0.8])
@pytest.mark.parametrize("name", ["kfoc", "kfoc-streamed", "kfoc-running", "kfac", "diagonal"])
def test_a_saved_state_goes_on_bit_by_bit(name: str, decay: float) -> None:
    model, stream = normalised().eval(), data()
    make: Callable[[], kfoc.Tracker] = lambda: kfoc.Tracker(  # noqa: E731
        model, estimator=ONE_PASS[name], decay=decay
    )
    whole, first, second = make(), make(), make()
    for inputs, targets in stream:
        whole.update(inputs, targets)
    first.update(*stream[0])
    first.update(*stream[1])
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second.load_state_dict(torch.load(file, weights_only=True))
    second.update(*stream[2])
    assert_same(second.curvature(), whole.curvature(), rtol=0.0)
    assert second.curvature().num_samples == whole.curvature().num_samples


def test_grouped_and_embedded_states_can_be_saved() -> None:
    model = nn.Sequential(
        nn.Embedding(7, 4), nn.LayerNorm(4), nn.Flatten(), nn.Unflatten(1, (4, 3)),
        nn.Conv1d(4, 6, 2, groups=2), nn.Flatten(), nn.Linear(12, 3),
    )  # fmt: skip
    tokens = torch.randint(7, (6, 3))
    first, second = kfoc.Tracker(model, decay=0.9), kfoc.Tracker(model, decay=0.9)
    first.update(tokens)
    second.load_state_dict(first.state_dict())
    assert_same(first.curvature(), second.curvature(), rtol=0.0)
    assert isinstance(second.curvature()["4"], kfoc.GroupedBlock)


class Silent(kfoc.State):
    """Takes in nothing, and does not say how it is decayed."""

    def add(self, samples: Any, alone: bool) -> None: ...

    def block(self, num_samples: float) -> kfoc.Block:
        return kfoc.DiagonalBlock(torch.zeros(1, 1))


class Undecayed(kfoc.Estimator):
    def begin(self, layer: str, samples: Any) -> kfoc.State:
        return Silent()


def test_errors_name_what_to_do() -> None:
    model, (x, y) = convolutional(), images(4)
    with pytest.raises(ValueError, match="call update"):
        kfoc.Tracker(model).curvature()
    with pytest.raises(ValueError, match="decay must lie in"):
        kfoc.Tracker(model, decay=1.5).update(x, y)
    with pytest.raises(ValueError, match="give one of them"):
        kfoc.Tracker(model, estimator=kfoc.KFOC(decay=0.9), decay=0.8).update(x, y)
    with pytest.raises(ValueError, match="several passes"):
        kfoc.Tracker(model, estimator=kfoc.EigenCorrected()).update(x, y)
    own = kfoc.Tracker(model, estimator=Undecayed(), decay=0.9)
    with pytest.raises(ValueError, match="does not say how it is decayed"):
        own.update(x, y)
    tracker = kfoc.Tracker(model)
    with pytest.raises(ValueError, match="this tracker has"):
        tracker.load_state_dict(kfoc.Tracker(model, seed=1).state_dict())


def test_bad_batches_leave_no_trace_or_stop_the_tracker() -> None:
    model, (x, y) = convolutional(), images(8)
    tracker, other = kfoc.Tracker(model, decay=0.9), kfoc.Tracker(model, decay=0.9)
    for each in (tracker, other):
        each.update(x, y)
    with pytest.raises(ValueError, match="not finite"):
        tracker.update(x * float("nan"), y)
    tracker.update(x, y)
    other.update(x, y)
    assert_same(tracker.curvature(), other.curvature(), rtol=0.0)

    good = tracker.state_dict()
    with torch.no_grad():
        model[3].weight[0, 0] = 1e200  # finite outputs behind the tanh, but not the derivatives
        model[3].weight[0, 1:] = 1e300
        model[0].weight.mul_(1e10)
    with pytest.raises(ValueError):  # noqa: PT011
        tracker.update(torch.full_like(x, 1e307), y)
    tracker.load_state_dict(good)


def test_a_state_of_other_classes_is_refused() -> None:
    model = convolutional()
    state = kfoc.Tracker(model).state_dict()
    for name in ("os:system", "fit:torch", "nowhere:Thing", "estimators.kfac:_State", "fit"):
        bad = state | {"layers": {"items": [["0", {"object": name, "fields": {}}]]}}
        with pytest.raises(ValueError, match="does not have"):
            kfoc.Tracker(model).load_state_dict(bad)


def replace(model: nn.Module) -> None:
    model[3] = nn.Linear(64, 6)


def insert(model: nn.Module) -> None:
    model.insert(4, nn.Linear(6, 6))


def remove(model: nn.Module) -> None:
    del model[3]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (replace, "layer '3' has changed"),
        (insert, "layer '4' has changed"),
        (remove, "layer '4' has changed"),
        (lambda m: m[3].requires_grad_(False), "requires_grad of '3.weight' has changed"),
        (lambda m: m[0].bias.requires_grad_(True), "requires_grad of '0.bias' has changed"),
    ],
)
def test_a_model_that_changes_is_told_and_begun_anew(
    change: Callable[[nn.Module], object], message: str
) -> None:
    model, stream = convolutional(), data()
    model[0].bias.requires_grad_(False)
    tracker, optimizer = kfoc.Tracker(model), kfoc.NaturalGradient(model)
    tracker.state_dict()  # selects layers
    tracker.update(*stream[0])
    optimizer.observe(stream[0][0])
    before = tracker.state_dict()
    change(model)
    for update in (tracker.update, optimizer.tracker.update):
        with pytest.raises(ValueError, match=rf"{message} since the first batch.* call reset\(\)"):
            update(*stream[1])
    assert str(tracker.state_dict()) == str(before)
    if change is remove:
        return  # its layers do not fit each other any more
    tracker.reset()
    tracker.update(*stream[1])
    expected = kfoc.Tracker(model)
    expected.update(*stream[1])
    assert_same(tracker.curvature(), expected.curvature(), rtol=0.0)
    optimizer.tracker.reset()
    model(stream[1][0]).square().mean().backward()
    optimizer.steps = 13  # at which no batch is due, but the first
    optimizer.observe(stream[1][0])
    if change not in (replace, insert):  # whose parameters the optimizer was not given
        optimizer.step()


def test_layers_are_selected_anew_before_the_first_batch() -> None:
    model, stream = convolutional(), data()
    tracker = kfoc.Tracker(model)
    tracker.state_dict()
    replace(model)
    tracker.update(*stream[0])
    assert tracker.curvature()["3"].frobenius_norm() > 0


def test_a_state_that_cannot_be_loaded_leaves_the_tracker_as_it_was() -> None:
    model, stream = convolutional(), data()
    tracker = kfoc.Tracker(model)
    tracker.update(*stream[0])
    before = str(tracker.state_dict())
    state = tracker.state_dict()
    forged = {"items": [["3", {"dtype": "load"}]]}
    for entry, message in (
        ({"layers": forged}, "no state of kfoc"),
        ({"layers": 5}, "'layers' must be dict"),
        ({"layers": {"items": 5}}, "no state of kfoc"),
        ({"layers": {"items": [["3", 5]]}}, "'layers' must be dict"),
        ({"batches": "forged"}, "'batches' must be int"),
        ({"selection": state["selection"] | {"skipped": {"3": 5}}}, "'skipped' must be"),
        ({"more": 5}, "'more', which is none of"),
    ):
        with pytest.raises(ValueError, match=message):
            tracker.load_state_dict(state | entry)
        assert str(tracker.state_dict()) == before
    with pytest.raises(ValueError, match="there is no 'weight'"):
        tracker.load_state_dict({k: v for k, v in state.items() if k != "weight"})
    optimizer = kfoc.NaturalGradient(model)
    saved = optimizer.state_dict()
    for key, value in (("steps", "forged"), ("preconditioner", 5), ("tracker", 5)):
        wrong = saved | {"curvature": saved["curvature"] | {key: value}}
        with pytest.raises(ValueError, match=rf"'{key}' must be"):
            optimizer.load_state_dict(wrong)
