"""Steps of the optimizer against dense natural-gradient steps."""

from __future__ import annotations

import copy
import io
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import kfoc
import oracle
from kfoc.applications.preconditioner import Preconditioner
from models import convolutional, images

LAYERS = ("0", "3", "5")


def loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return nn.functional.cross_entropy(model(x), y)


def backward(model: nn.Module, x: Tensor, y: Tensor) -> None:
    model.zero_grad()
    loss(model, x, y).backward()


def stacked(model: nn.Module, layer: str, what: str) -> Tensor:
    """[W | b] of a layer, or of its gradients, flattened."""
    module = model.get_submodule(layer)
    pair = [module.weight, module.bias]
    pair = [p.grad for p in pair] if what == "grad" else [p.detach() for p in pair]
    return torch.cat([pair[0].flatten(1), pair[1][:, None]], 1).flatten().clone()


def dense_directions(
    model: nn.Module, x: Tensor, damping: float, scale: float = 1.0
) -> dict[str, Tensor]:
    """(scale * F + damping)^-1 g by layer, F the exact block of x, from per-sample gradients."""
    found = {}
    for layer in LAYERS:
        fisher = oracle.fisher_block(model, layer, x, oracle.categorical_exact(model(x).detach()))
        damped = scale * fisher + damping * torch.eye(len(fisher))
        found[layer] = torch.linalg.solve(damped, stacked(model, layer, "grad"))
    return found


def exact(model: nn.Module, lr: float = 0.1, **options: Any) -> kfoc.NaturalGradient:
    """With the exact blocks of the present batch alone, and none of the extras."""
    plain: dict[str, Any] = {"momentum": 0.0, "kl_clip": None, "damping": 0.05, "method": "exact"}
    plain |= {"estimator": kfoc.BlockDiagonal(), "fisher": "exact", "update_every": 1}
    return kfoc.NaturalGradient(model, lr, **(plain | options))


def moved(model: nn.Module, optimizer: kfoc.NaturalGradient, x: Tensor) -> dict[str, Tensor]:
    before = {layer: stacked(model, layer, "data") for layer in LAYERS}
    optimizer.observe(x)
    optimizer.step()
    return {layer: stacked(model, layer, "data") - before[layer] for layer in LAYERS}


@pytest.mark.parametrize("scale", [1.0, 0.25])
def test_a_step_is_the_dense_natural_gradient(scale: float) -> None:
    model, (x, y) = convolutional(), images(12)
    optimizer = exact(model, scale=scale)
    backward(model, x, y)
    expected = dense_directions(model, x, 0.05, scale)
    for layer, step in moved(model, optimizer, x).items():
        torch.testing.assert_close(step, -0.1 * expected[layer], rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("estimator", [kfoc.KFOC(rtol=0), kfoc.KFAC()], ids=["kfoc", "kfac"])
@pytest.mark.parametrize("method", ["exact", "pi"])
def test_a_step_by_products_is_that_of_the_dense_product(
    estimator: kfoc.Estimator, method: str
) -> None:
    model, (x, y) = convolutional(), images(12)
    curvature = kfoc.fit(model, [(x, None)], fisher="exact", estimator=estimator)
    optimizer = exact(model, estimator=estimator, method=method, decay=1.0)
    backward(model, x, y)
    gradients = {layer: stacked(model, layer, "grad") for layer in LAYERS}
    for layer, step in moved(model, optimizer, x).items():
        left, right = curvature[layer].left, curvature[layer].right
        shift = torch.tensor(0.05)
        damped = torch.kron(left, right) + shift * torch.eye(len(left) * len(right))
        if method == "pi":
            pi = ((right.trace() / len(right)) / (left.trace() / len(left))).sqrt()
            damped = torch.kron(
                left + shift.sqrt() / pi * torch.eye(len(left)),
                right + shift.sqrt() * pi * torch.eye(len(right)),
            )
        expected = torch.linalg.solve(damped, gradients[layer])
        torch.testing.assert_close(step, -0.1 * expected, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("limit", [1e-4, 1e3])
def test_kl_clip_bounds_the_step(limit: float) -> None:
    model, (x, y) = convolutional(), images(12)
    optimizer = exact(model, kl_clip=limit)
    backward(model, x, y)
    directions = dense_directions(model, x, 0.05)
    size = sum(0.1**2 * (d @ stacked(model, layer, "grad")) for layer, d in directions.items())
    shrink = min(1.0, math.sqrt(limit / size))
    assert (shrink < 1) == (limit == 1e-4)
    for layer, step in moved(model, optimizer, x).items():
        torch.testing.assert_close(step, -0.1 * shrink * directions[layer], rtol=1e-8, atol=1e-12)


def test_momentum_decay_of_weights_and_schedulers() -> None:
    model, (x, y) = convolutional(), images(12)
    optimizer = exact(model, momentum=0.6, weight_decay=0.3, decay=0.8)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    velocity = {layer: torch.zeros(()) for layer in LAYERS}
    weights = {layer: stacked(model, layer, "data") for layer in LAYERS}
    fishers: dict[str, Any] = {}
    lr, weight = 0.1, 0.0
    for _ in range(3):
        backward(model, x, y)
        weight = 0.8 * weight + len(x)
        for layer in LAYERS:
            fisher = oracle.fisher_block(
                model, layer, x, oracle.categorical_exact(model(x).detach())
            )
            fishers[layer] = 0.8 * fishers.get(layer, 0.0) + len(x) * fisher
            damped = fishers[layer] / weight + 0.05 * torch.eye(len(fisher))
            direction = torch.linalg.solve(damped, stacked(model, layer, "grad"))
            velocity[layer] = 0.6 * velocity[layer] + direction
            weights[layer] = (1 - lr * 0.3) * weights[layer] - lr * velocity[layer]
        moved(model, optimizer, x)
        scheduler.step()
        lr *= 0.5
        for layer in LAYERS:
            torch.testing.assert_close(stacked(model, layer, "data"), weights[layer])


def test_groups_have_rates_of_their_own() -> None:
    model, (x, y) = convolutional(), images(12)
    groups = [
        {"params": list(model[0].parameters())},
        {"params": list(model[3].parameters()), "lr": 0.02},
        {"params": list(model[5].parameters()), "lr": 0.0},
    ]
    optimizer = exact(model, params=groups)
    backward(model, x, y)
    directions = dense_directions(model, x, 0.05)
    rates = dict(zip(LAYERS, (0.1, 0.02, 0.0), strict=True))
    for layer, step in moved(model, optimizer, x).items():
        torch.testing.assert_close(step, -rates[layer] * directions[layer], rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("other", ["adamw", "sgd"])
def test_parameters_without_a_block_go_by_a_first_order_method(other: str) -> None:
    model, (x, y) = convolutional(), images(12)
    twin = copy.deepcopy(model)
    optimizer = exact(model, layers="0", other=other, other_scale=0.1, weight_decay=0.2)
    rest = [p for name, p in twin.named_parameters() if not name.startswith("0")]
    reference: torch.optim.Optimizer
    if other == "adamw":
        reference = torch.optim.AdamW(rest, 0.01, weight_decay=2.0)  # times lr: 0.1 * 0.2
    else:
        reference = torch.optim.SGD(rest, 0.01)
    for _ in range(3):
        backward(model, x, y)
        twin[0].load_state_dict(model[0].state_dict())
        backward(twin, x, y)
        if other == "sgd":
            with torch.no_grad():
                for parameter in rest:
                    parameter.mul_(1 - 0.1 * 0.2)
        reference.step()
        optimizer.observe(x)
        optimizer.step()
        for name, parameter in model.named_parameters():
            if not name.startswith("0"):
                torch.testing.assert_close(parameter, twin.get_parameter(name))


def test_a_layer_that_is_not_trained_as_a_whole_goes_by_the_first_order_method() -> None:
    model, (x, y) = convolutional(), images(12)
    chosen = [p for name, p in model.named_parameters() if name != "5.bias"]
    optimizer = exact(model, params=chosen, other="sgd", other_scale=0.5)
    backward(model, x, y)
    expected = dense_directions(model, x, 0.05)
    gradient, bias = model[5].weight.grad.clone(), model[5].bias.clone()
    expected["5"] = torch.cat([0.5 * gradient, torch.zeros(3, 1)], 1).flatten()
    for layer, step in moved(model, optimizer, x).items():
        torch.testing.assert_close(step, -0.1 * expected[layer], rtol=1e-8, atol=1e-12)
    assert torch.equal(model[5].bias, bias)


def trainer(model: nn.Module, **options: Any) -> tuple[kfoc.NaturalGradient, Any]:
    optimizer = kfoc.NaturalGradient(model, 0.05, update_every=1, samples=4, **options)
    return optimizer, torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)


@pytest.mark.parametrize("method", ["pi", "exact"])
@pytest.mark.parametrize("invert_every", [1, 3])
@pytest.mark.parametrize("estimator", [kfoc.KFOC(), kfoc.KFAC()], ids=["kfoc", "kfac"])
def test_a_saved_state_goes_on_bit_by_bit(
    method: str, invert_every: int, estimator: kfoc.Estimator
) -> None:
    torch.set_default_dtype(torch.float32)
    x, y = images(28, torch.float32)
    whole = nn.Sequential(*convolutional(torch.float32), nn.LayerNorm(3), nn.PReLU())
    options = {"method": method, "invert_every": invert_every, "estimator": estimator}
    optimizer, scheduler = trainer(whole, **options)

    def run(model: nn.Module, steps: range, optimizer: Any, scheduler: Any) -> None:
        for k in steps:
            batch = x[4 * k : 4 * k + 4], y[4 * k : 4 * k + 4]
            optimizer.observe(batch[0])
            backward(model, *batch)
            optimizer.step()
            scheduler.step()

    run(whole, range(5), optimizer, scheduler)  # the last inverse is older than the last batch
    file = io.BytesIO()
    saved = [whole.state_dict(), optimizer.state_dict(), scheduler.state_dict()]
    torch.save(saved, file)
    run(whole, range(5, 7), optimizer, scheduler)

    file.seek(0)
    again = nn.Sequential(*convolutional(torch.float32), nn.LayerNorm(3), nn.PReLU())
    fresh, fresh_scheduler = trainer(again, **options)
    states = torch.load(file, weights_only=True)
    for part, state in zip((again, fresh, fresh_scheduler), states, strict=True):
        part.load_state_dict(state)
    run(again, range(5, 7), fresh, fresh_scheduler)
    for name, parameter in whole.named_parameters():
        assert torch.equal(parameter, again.get_parameter(name)), name


def test_observing_leaves_everything_as_it_is() -> None:
    model, (x, y) = convolutional().train(), images(8)
    model.insert(1, nn.BatchNorm2d(4))
    backward(model, x, y)
    gradients = [parameter.grad.clone() for parameter in model.parameters()]
    buffers, random = copy.deepcopy(list(model.buffers())), torch.get_rng_state()
    optimizer = kfoc.NaturalGradient(model)
    optimizer.observe(x)
    assert torch.equal(torch.get_rng_state(), random)
    assert all(map(torch.equal, buffers, model.buffers()))
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), gradients, strict=True))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_observations_and_inversions_keep_to_their_intervals() -> None:
    model, (x, y) = convolutional(), images(8)
    damped_at: list[int] = []

    def damping(step: int) -> float:
        damped_at.append(step)
        return 0.1 / (1 + step)

    optimizer = kfoc.NaturalGradient(
        model, update_every=5, invert_every=3, samples=5, damping=damping
    )
    for _ in range(7):
        optimizer.observe(x)
        optimizer.observe(x)
        backward(model, x, y)
        optimizer.step()
    assert optimizer.tracker.num_batches == 5  # before the steps 0, 1, 2, 4 and 5
    assert damped_at == [0, 1, 2, 3, 6]
    weight = sum(0.95**k for k in range(5))
    assert optimizer.tracker.curvature().num_samples == round(5 * weight)


def test_closures_are_called_once_with_gradients() -> None:
    model, (x, y) = convolutional(), images(8)
    optimizer = kfoc.NaturalGradient(model, 1e-3)
    optimizer.observe(x)
    values: list[Tensor] = []

    def closure() -> Tensor:
        backward(model, x, y)
        values.append(loss(model, x, y).detach())
        return values[-1]

    assert optimizer.step(closure) is values[0]
    assert len(values) == 1
    assert loss(model, x, y) < values[0]


def test_training_goes_faster_than_by_the_gradient() -> None:
    model, (x, y) = convolutional(), images(64)
    optimizer = kfoc.NaturalGradient(model, 0.3, update_every=2, damping=1e-2)
    first = loss(model, x, y).item()
    for _ in range(30):
        optimizer.observe(x)
        backward(model, x, y)
        optimizer.step()
    assert loss(model, x, y).item() < 0.5 * first


@pytest.mark.parametrize("kind", ["grouped", "diagonal"])
def test_the_preconditioner_inverts_what_damped_inverts(kind: str) -> None:
    """Against the other implementation, for the blocks that are no plain products."""
    model = nn.Sequential(
        nn.Embedding(2000, 4), nn.LayerNorm(4), nn.Conv1d(4, 6, 2, groups=2, padding=1),
        nn.Flatten(), nn.Linear(30, 3),
    )  # fmt: skip
    estimator = kfoc.Diagonal() if kind == "diagonal" else kfoc.KFOC()
    curvature = kfoc.fit(model, [(torch.randint(2000, (9, 4)), None)], estimator=estimator)
    vector = {name: torch.randn_like(p) for name, p in model.named_parameters()}
    for method in ("pi", "exact"):
        found = Preconditioner.of(curvature, 0.02, method=method, scale=3.0).solve(vector)
        expected = curvature.damped(0.02, method=method, scale=3.0).solve(vector)
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-8, atol=1e-10)


def test_errors_name_what_to_do() -> None:
    model, (x, y) = convolutional(), images(4)
    optimizer = kfoc.NaturalGradient(model)
    backward(model, x, y)
    with pytest.raises(ValueError, match=r"call optimizer\.observe"):
        optimizer.step()
    foreign = kfoc.NaturalGradient(model, params=[nn.Parameter(torch.ones(3))])
    foreign.observe(x)
    with pytest.raises(ValueError, match=r"not the model's"):
        foreign.step()
    with pytest.raises(ValueError, match="another optimizer"):
        optimizer.load_state_dict(torch.optim.SGD(model.parameters(), 0.1).state_dict())
    options: list[dict[str, Any]] = [
        {"method": "eigen"}, {"other": "adam"}, {"update_every": 0}, {"kl_clip": 0.0},
        {"momentum": -1.0},
    ]  # fmt: skip
    for option in options:
        with pytest.raises(ValueError, match=next(iter(option))):
            kfoc.NaturalGradient(model, **option)
