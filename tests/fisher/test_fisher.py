"""Products and solves with the true Fisher, against dense algebra on per-sample Jacobians."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import kfoc
from dense_fisher import dense
from models import batches, convolutional, images

LIKELIHOODS = ["categorical", "gaussian", "bernoulli"]


class Attention(nn.Module):
    """One block over (N, 5, 4), of what torch has fused kernels for."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.TransformerEncoderLayer(4, 2, 6, 0.0, batch_first=True)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.block(x).mean(1))


class Tied(nn.Module):
    """The mean of tokens to their scores, by the same weight."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(3, 4)
        self.hidden = nn.Linear(4, 4)
        self.head = nn.Linear(4, 3, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.hidden(self.tokens(x).mean(1))))


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[int], Tensor]]] = {
    "mlp": (mlp, lambda count: torch.randn(count, 4)),
    "cnn": (convolutional, lambda count: images(count)[0]),
    "attention": (Attention, lambda count: torch.randn(count, 5, 4)),
    "tied": (Tied, lambda count: torch.randint(3, (count, 5))),
}


def labels(likelihood: str, count: int) -> Tensor:
    return {
        "categorical": torch.randint(3, (count,)),
        "gaussian": torch.randn(count, 3),
        "bernoulli": torch.rand(count, 3),
    }[likelihood]


def problem(name: str = "mlp", likelihood: str = "categorical", count: int = 14) -> tuple:
    """A model in eval mode, and batches of 5, 5 and 4."""
    make, inputs = MODELS[name]
    model = make().eval()
    return model, batches(inputs(count), labels(likelihood, count), 5)


def vectors(model: nn.Module, *lead: int) -> dict[str, Tensor]:
    return {name: torch.randn(*lead, *p.shape) for name, p in model.named_parameters()}


def flat(found: dict[str, Tensor], lead: int = 1) -> Tensor:
    return torch.cat([part.flatten(lead) for part in found.values()], lead)


@pytest.mark.parametrize("fisher", ["exact", "empirical"])
@pytest.mark.parametrize("likelihood", LIKELIHOODS)
@pytest.mark.parametrize("name", MODELS)
def test_products(name: str, likelihood: str, fisher: str) -> None:
    model, data = problem(name, likelihood)
    matrix = dense(model, data, likelihood, fisher)
    found = kfoc.Fisher(model, data, likelihood, fisher=fisher)
    assert found.num_samples is None
    v = vectors(model, 3)
    product, form = found.matvec(v), found.quadratic_form(v)
    assert found.num_samples == 14
    rows = flat(v)
    torch.testing.assert_close(flat(product), rows @ matrix)
    torch.testing.assert_close(form, (rows @ matrix * rows).sum(1))
    assert found._passes.modes.forward
    one = {key: part[1] for key, part in v.items()}
    torch.testing.assert_close(flat(found.matvec(one), 0), rows[1] @ matrix)
    torch.testing.assert_close(found.quadratic_form(one), rows[1] @ matrix @ rows[1])
    nested = {key: part.view(3, 1, *part.shape[1:]) for key, part in v.items()}
    assert found.quadratic_form(nested).shape == (3, 1)
    assert all(part.shape == nested[key].shape for key, part in found.matvec(nested).items())


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
@pytest.mark.parametrize("name", MODELS)
def test_solves(name: str, likelihood: str) -> None:
    model, data = problem(name, likelihood)
    matrix = dense(model, data, likelihood)
    matrix = matrix + 0.03 * torch.eye(len(matrix))
    curvature = kfoc.fit(model, data, likelihood, fisher="exact")
    fisher = kfoc.Fisher(model, data, likelihood)
    for v in (vectors(model, 4), vectors(model)):
        rows = flat(v, int(v[next(iter(v))].ndim > model.get_parameter(next(iter(v))).ndim))
        expected = torch.linalg.solve(matrix, rows.mT if rows.ndim > 1 else rows)
        expected = expected.mT if rows.ndim > 1 else expected
        for preconditioner in (None, curvature, curvature.damped(0.1)):
            found = fisher.solve(
                v, 0.03, preconditioner=preconditioner, rtol=1e-9, max_products=200
            )
            assert found.converged
            assert found.residual.shape == rows.shape[:-1]
            assert (found.residual <= 1e-9).all()
            torch.testing.assert_close(
                flat(found.vector, rows.ndim - 1), expected, rtol=1e-6, atol=1e-6
            )


@pytest.mark.parametrize("name", ["mlp", "cnn", "attention"])
def test_a_closer_preconditioner_takes_fewer_products(name: str) -> None:
    """Of a gradient, to a coarse residual; to a fine one what the blocks leave out matters."""
    model, data = problem(name, count=40)
    loss = nn.functional.cross_entropy(model(data[0][0][:1]), data[0][1][:1])
    gradients = torch.autograd.grad(loss, model.parameters())
    v = {n: g for (n, _), g in zip(model.named_parameters(), gradients, strict=True)}
    fisher = kfoc.Fisher(model, data)
    curvature = kfoc.fit(model, data, estimator=kfoc.BlockDiagonal(), fisher="exact")
    plain, close = (
        fisher.solve(v, 1e-3, preconditioner=each, rtol=0.1).products for each in (None, curvature)
    )
    assert close <= 0.6 * plain


def test_exact_blocks_of_one_layer_take_one_product() -> None:
    model, data = problem()
    curvature = kfoc.fit(model, data, estimator=kfoc.BlockDiagonal(), fisher="exact")
    fisher = kfoc.Fisher(model, data, layers="2")
    v = {name: part for name, part in vectors(model, 3).items() if name.startswith("2.")}
    # Blocks of other layers are left aside.
    found = fisher.solve(v, 1e-2, preconditioner=curvature)
    assert found.products == 1
    torch.testing.assert_close(found.vector, curvature_of(curvature, "2").solve(v, 1e-2))


def test_parameters_without_a_block_are_solved_for_too() -> None:
    model, data = problem()
    v, matrix = vectors(model, 2), dense(model, data, "categorical")
    some = kfoc.fit(model, data, layers="2", fisher="exact")
    found = kfoc.Fisher(model, data).solve(v, preconditioner=some, rtol=1e-9, max_products=100)
    expected = torch.linalg.solve(matrix + 1e-2 * torch.eye(len(matrix)), flat(v).mT).mT
    torch.testing.assert_close(flat(found.vector), expected, rtol=1e-6, atol=1e-6)


def curvature_of(curvature: kfoc.Curvature, layer: str) -> kfoc.Curvature:
    layouts = {layer: curvature.layouts[layer]}
    return kfoc.Curvature({layer: curvature[layer]}, curvature.num_samples, layouts, {})


@pytest.mark.parametrize("layers", ["0", ["0", "5"], "[35]"])
def test_layers_by_name(layers: Any) -> None:
    model, data = problem("cnn")
    fisher = kfoc.Fisher(model, data, layers=layers)
    kept = {"0": "0", "[35]": "35"}.get(layers if isinstance(layers, str) else "", "05")
    names = [name for name, _ in model.named_parameters() if name[0] in kept]
    assert list(fisher.parameters) == names
    v = {name: torch.randn(2, *model.get_parameter(name).shape) for name in names}
    matrix = dense(model, data, "categorical", names=names)
    torch.testing.assert_close(flat(fisher.matvec(v)), flat(v) @ matrix)


def test_parameters_of_a_curvature_and_frozen_ones() -> None:
    model, data = problem()
    model[0].bias.requires_grad_(False)
    fisher = kfoc.Fisher(model, data)
    assert fisher.parameters == ("0.weight", "2.weight", "2.bias")
    curvature = kfoc.fit(model, data, layers="2")
    assert kfoc.Fisher(model, data, layers=curvature).parameters == ("2.weight", "2.bias")
    with pytest.raises(ValueError, match="matches no layer"):
        kfoc.Fisher(model, data, layers="7")
    model[0].requires_grad_(False)
    with pytest.raises(ValueError, match="has no parameters that are trained"):
        kfoc.Fisher(model, data, layers="0")


def test_tied_weights_by_either_name() -> None:
    model, data = problem("tied")
    curvature = kfoc.fit(model, data, layers=["head", "hidden"], fisher="exact")
    v = {name: torch.randn(2, *p.shape) for name, p in model.named_parameters()}
    fisher = kfoc.Fisher(model, data)
    found = fisher.solve(v, preconditioner=curvature, rtol=1e-8, max_products=100)
    matrix = dense(model, data, "categorical")
    expected = torch.linalg.solve(matrix + 1e-2 * torch.eye(len(matrix)), flat(v).mT).mT
    torch.testing.assert_close(flat(found.vector), expected, rtol=1e-5, atol=1e-6)


def test_tied_weights_by_the_name_of_a_curvature() -> None:
    model, data = problem("tied")
    curvature = kfoc.fit(model, data, layers="head", fisher="exact")
    ((name,),) = curvature.parameters.values()
    fisher = kfoc.Fisher(model, data, layers=curvature)
    v = {name: torch.randn(2, 3, 4)}
    matrix = dense(model, data, "categorical", names=["tokens.weight"])
    torch.testing.assert_close(flat(fisher.matvec(v)), flat(v) @ matrix)


@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision(autocast: bool) -> None:
    model, data = problem("mlp")
    v = vectors(model, 2)
    expected = flat(v) @ dense(model, data, "categorical")
    dtype = torch.float32 if autocast else torch.bfloat16
    model.to(dtype)
    fisher = kfoc.Fisher(model, [(x.to(dtype), y) for x, y in data])
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found = flat(fisher.matvec({name: part.float() for name, part in v.items()}))
    assert found.dtype == torch.float32
    torch.testing.assert_close(
        found.double(), expected, rtol=0, atol=0.03 * expected.abs().max().item()
    )


@pytest.mark.parametrize("tied", [False, True])
def test_padding_has_no_gradient(tied: bool) -> None:
    """As torch has it in reverse mode, and not in forward mode."""
    model, data = problem("tied")
    model.tokens.padding_idx = 1
    if not tied:
        model.head.weight = nn.Parameter(torch.randn(3, 4))
    fisher, v = kfoc.Fisher(model, data), vectors(model, 2)
    form = fisher.quadratic_form(v)
    if not tied:
        matrix = dense(model, data, "categorical")
        torch.testing.assert_close(flat(fisher.matvec(v)), flat(v) @ matrix)
        torch.testing.assert_close(form, (flat(v) @ matrix * flat(v)).sum(1))
    assert fisher._passes.modes.forward is not tied
    product = fisher.matvec(v)
    torch.testing.assert_close(form, (flat(v) * flat(product)).sum(1))


class Named(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = mlp()

    def forward(self, features: Tensor, shift: Tensor) -> dict[str, Tensor]:
        return {"scores": self.inner(features + shift)}


def test_dict_batches_by_predict() -> None:
    model, data = Named(), []
    for size in (5, 4):
        inputs = {"features": torch.randn(size, 4), "shift": torch.randn(size, 4)}
        data.append(inputs | {"labels": torch.randint(3, (size,))})

    def predict(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
        return model(**inputs)["scores"]

    pairs = [({k: b[k] for k in ("features", "shift")}, b["labels"]) for b in data]
    for kind in ("exact", "empirical"):
        fisher = kfoc.Fisher(model, data, predict=predict, fisher=kind)
        v = vectors(model, 2)
        matrix = dense(model, pairs, "categorical", kind, called=predict)
        torch.testing.assert_close(flat(fisher.matvec(v)), flat(v) @ matrix)


def test_sequences_of_labels_and_those_that_are_ignored() -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    x, y = torch.randn(4, 6, 4), torch.randint(3, (4, 6))
    y[0, 2:], y[3] = -100, -100
    fisher = kfoc.Fisher(model, [(x, y)])
    counted = y.flatten() != -100
    single = [(x.flatten(0, 1)[counted], y.flatten()[counted])]
    matrix = dense(model, single, "categorical") * counted.sum() / 4
    v = vectors(model, 2)
    torch.testing.assert_close(flat(fisher.matvec(v)), flat(v) @ matrix)


def test_chunks_and_vectors_of_other_kinds() -> None:
    model, data = problem()
    v = vectors(model, 5)
    whole = kfoc.Fisher(model, data)
    expected = whole.matvec(v)
    for size in (1, 2, 5):
        found = kfoc.Fisher(model, data, chunk_size=size).matvec(v)
        torch.testing.assert_close(found, expected)
    single = {name: part.float().requires_grad_() for name, part in v.items()}
    found = whole.matvec(single)
    assert {part.dtype for part in found.values()} == {torch.float32}
    assert not any(part.requires_grad for part in found.values())
    torch.testing.assert_close(found, {name: part.float() for name, part in expected.items()})
    with torch.inference_mode():
        torch.testing.assert_close(whole.matvec(v), expected)
    empty = {name: part[:0] for name, part in v.items()}
    assert whole.quadratic_form(empty).shape == (0,)
    assert whole.solve(empty, preconditioner=kfoc.fit(model, data)).products == 0
    assert torch.equal(whole.unflatten(whole.flatten(v))["0.bias"], v["0.bias"])


def test_as_a_linear_operator_of_scipy() -> None:
    pytest.importorskip("scipy")
    model, data = problem()
    fisher = kfoc.Fisher(model, data)
    operator = fisher.to_linear_operator()
    matrix = dense(model, data, "categorical")
    assert operator.shape == matrix.shape
    v = torch.randn(len(matrix), 3)
    torch.testing.assert_close(torch.as_tensor(operator @ v.numpy()), matrix @ v)


class Branching(nn.Module):
    """It goes another way where its values are others."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = mlp()

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.inner[0](x)
        return self.inner[2](hidden.sin() if hidden.sum() > 1e9 else hidden.tanh())


class Cube(torch.autograd.Function):
    """Without a forward mode."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 3 * x**2 * grad


class Cubed(nn.Module):
    def __init__(self, custom: bool) -> None:
        super().__init__()
        self.inner, self.custom = mlp(), custom

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.inner(x)
        return Cube.apply(hidden) if self.custom else hidden**3


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.recurrent, self.head = nn.LSTM(4, 3, batch_first=True), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.recurrent(x)[0][:, -1])


def test_models_whose_way_depends_on_values() -> None:
    x, y = torch.randn(6, 4), torch.randint(3, (6,))
    model, twin = Branching(), mlp()
    twin.load_state_dict(model.inner.state_dict())
    v = vectors(model, 3)
    expected = flat(v) @ dense(twin, [(x, y)], "categorical")
    torch.testing.assert_close(flat(kfoc.Fisher(model, [(x, y)]).matvec(v)), expected)


def test_functions_without_a_forward_mode() -> None:
    x, y = torch.randn(6, 4), torch.randint(3, (6,))
    model, twin = Cubed(True), Cubed(False)
    twin.load_state_dict(model.state_dict())
    fisher, v = kfoc.Fisher(model, [(x, y)]), vectors(model, 3)
    matrix = dense(twin, [(x, y)], "categorical")
    torch.testing.assert_close(flat(fisher.matvec(v)), flat(v) @ matrix)
    torch.testing.assert_close(fisher.quadratic_form(v), (flat(v) @ matrix * flat(v)).sum(1))
    assert not fisher._passes.modes.forward


def test_recurrent_layers() -> None:
    model, x, y = Recurrent(), torch.randn(4, 5, 4), torch.randint(3, (4,))
    v = vectors(model, 2)
    found = kfoc.Fisher(model, [(x, y)]).matvec(v)
    rows = []
    for n in range(4):
        outputs = model(x[n : n + 1])
        by = [torch.autograd.grad(o, model.parameters(), retain_graph=True) for o in outputs[0]]
        J = torch.stack([torch.cat([part.flatten() for part in each]) for each in by])
        p = outputs[0].softmax(0).detach()
        rows.append(J.mT @ (p.diag() - p[:, None] * p) @ J)
    torch.testing.assert_close(flat(found), flat(v) @ (sum(rows) / 4))


class Hooked(nn.Module):
    """A hook halves what goes back to the first layer, which forward mode knows nothing of."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = mlp()

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.inner[0](x)
        if hidden.requires_grad:
            hidden.register_hook(lambda grad: grad / 2)
        return self.inner[2](hidden.tanh())


def test_products_are_symmetric_where_hooks_change_gradients() -> None:
    model, x, y = Hooked(), torch.randn(6, 4), torch.randint(3, (6,))
    fisher = kfoc.Fisher(model, [(x, y)])
    v = vectors(model, 3)
    form = fisher.quadratic_form(v)
    matrix = flat(fisher.matvec(fisher.unflatten(torch.eye(43))))
    torch.testing.assert_close(form, (flat(v) @ matrix * flat(v)).sum(1))
    torch.testing.assert_close(matrix, matrix.mT)
    assert not fisher._passes.modes.forward


class Noisy(nn.Module):
    """Dropout between linear layers, and its masks' own expectations."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.drop = mlp(), nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner[2](self.drop(self.inner[0](x).tanh()))


def test_dropout_in_train_mode_draws_what_a_fit_draws() -> None:
    model, x, y = Noisy().train(), torch.randn(12, 4), torch.randint(3, (12,))
    data = batches(x, y, 5)
    curvature = kfoc.fit(
        model, data, fisher="exact", seed=3, estimator=kfoc.BlockDiagonal(), verify=False
    )
    for layer in ("inner.0", "inner.2"):
        names = curvature.parameters[layer]
        v = {name: torch.randn(2, *model.get_parameter(name).shape) for name in names}
        found = kfoc.Fisher(model, data, layers=layer, seed=3).matvec(v)
        own = curvature_of(curvature, layer)
        torch.testing.assert_close(found, own.matvec(v))


def test_batch_statistics_are_refused() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    with pytest.raises(ValueError, match=r"call model\.eval\(\)"):
        kfoc.Fisher(model, [])


class Counting(nn.Module):
    """Writes to a buffer, and draws."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Dropout())
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        if len(x) == 3:
            raise ValueError("of the model's own")
        return self.inner(x)


def everything(model: nn.Module) -> list[Any]:
    state = [copy.deepcopy(model.state_dict())]
    state += [[m.training for m in model.modules()]]
    state += [[(p.requires_grad, p.grad) for p in model.parameters()]]
    state += [torch.get_rng_state(), torch.is_grad_enabled()]
    kernels = torch.backends.cuda
    state += [kernels.flash_sdp_enabled(), kernels.mem_efficient_sdp_enabled()]
    return [*state, torch.backends.mha.get_fastpath_enabled()]


@pytest.mark.parametrize("fails", [False, True])
def test_nothing_is_left_changed(fails: bool) -> None:
    model = Counting()
    model.inner[1].eval()
    model.inner[0].bias.requires_grad_(False)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    x, y = torch.randn(13 if fails else 12, 4), torch.randint(3, (13 if fails else 12,))
    fisher = kfoc.Fisher(model, batches(x, y, 5))
    v = {name: torch.randn(2, *model.get_parameter(name).shape) for name in fisher.parameters}
    before = everything(model)
    if fails:
        with pytest.raises(ValueError, match=r"batch 2: .*own"):
            fisher.matvec(v)
    else:
        fisher.matvec(v)
        fisher.quadratic_form(v)
        fisher.solve(v, rtol=None, max_products=2)
    after = everything(model)
    torch.testing.assert_close(before, after, rtol=0, atol=0)


def test_a_limit_of_products_is_a_warning() -> None:
    model, data = problem("cnn")
    fisher, v = kfoc.Fisher(model, data), vectors(model)
    with pytest.warns(RuntimeWarning, match=r"residual of .* in 2 products, and rtol is 0.001: .*"):
        found = fisher.solve(v, 1e-4, max_products=2)
    assert not found.converged
    assert found.products == 2
    matrix = dense(model, data, "categorical")
    left = flat(v, 0) - (matrix + 1e-4 * torch.eye(len(matrix))) @ flat(found.vector, 0)
    torch.testing.assert_close(found.residual, left.norm() / flat(v, 0).norm())
    some = kfoc.fit(model, data, layers="3")
    with pytest.warns(RuntimeWarning, match="has a block for 0.weight, 0.bias, 5.weight, 5.bias"):
        fisher.solve(v, 1e-4, preconditioner=some, max_products=2)
    assert fisher.solve(v, 1e-4, rtol=None, max_products=2).converged


class Reshuffled:
    """Other batches on each reading, or fewer."""

    def __init__(self, data: list, fewer: bool) -> None:
        self.data, self.fewer, self.readings = data, fewer, 0

    def __iter__(self) -> Iterator:
        self.readings += 1
        again = self.readings > 1
        return iter(self.data[:-1] if self.fewer and again else self.data[:: -1 if again else 1])


@pytest.mark.parametrize("fewer", [False, True])
def test_other_batches_in_a_later_pass_are_an_error(fewer: bool) -> None:
    model, data = problem(count=15)
    message = "data has 2 batches, and had 3" if fewer else "batch 0: this pass does not see"
    with pytest.raises(ValueError, match=message):
        kfoc.Fisher(model, Reshuffled(data, fewer)).solve(vectors(model))


def test_a_model_that_was_trained_between_products_is_an_error() -> None:
    model, data = problem()
    fisher, v = kfoc.Fisher(model, data), vectors(model)
    fisher.matvec(v)
    with torch.no_grad():
        model[0].weight += 0.1
    with pytest.raises(ValueError, match=r"make a new kfoc\.Fisher"):
        fisher.matvec(v)


def test_a_first_pass_that_failed_leaves_no_traces() -> None:
    model, data = problem()
    bad = [*data, (torch.full((2, 4), float("nan")), torch.zeros(2).long())]
    fisher, v = kfoc.Fisher(model, bad), vectors(model)
    with pytest.raises(ValueError, match="batch 3: the model's outputs are not finite"):
        fisher.matvec(v)
    bad.pop()
    torch.testing.assert_close(fisher.matvec(v), kfoc.Fisher(model, data).matvec(v))


def test_progress_tells_of_products() -> None:
    model, data = problem()
    told: list[kfoc.Progress] = []
    fisher = kfoc.Fisher(model, data, progress=told.append)
    fisher.solve(vectors(model), rtol=None, max_products=3)
    assert [(p.pass_number, p.pass_limit, p.batch, p.samples) for p in told[-3:]] == [
        (3, 3, 1, 5),
        (3, 3, 2, 10),
        (3, 3, 3, 14),
    ]


BAD = {
    "damping must be positive": {"damping": 0.0},
    "damping must be a number": {"damping": {"0": 1.0}},
    "rtol must be": {"rtol": -1.0},
    "max_products must be at least 1": {"max_products": 0},
}


@pytest.mark.parametrize("message", BAD)
def test_bad_solves(message: str) -> None:
    model, data = problem()
    with pytest.raises(ValueError, match=message):
        kfoc.Fisher(model, data).solve(vectors(model), **BAD[message])


def test_bad_calls() -> None:
    model, data = problem()
    with pytest.raises(ValueError, match="fisher must be one of exact, empirical"):
        kfoc.Fisher(model, data, fisher="mc")
    with pytest.raises(ValueError, match="data is an iterator"):
        kfoc.Fisher(model, iter(data))
    with pytest.raises(ValueError, match="predict must be a function"):
        kfoc.Fisher(model, data, predict=3)
    with pytest.raises(ValueError, match="data has no batches"):
        kfoc.Fisher(model, []).matvec(vectors(model))
    with pytest.raises(ValueError, match="needs integer class labels"):
        kfoc.Fisher(model, [(data[0][0], None)], fisher="empirical").matvec(vectors(model))
    fisher, v = kfoc.Fisher(model, data), vectors(model)
    with pytest.raises(ValueError, match=r"it lacks 2\.bias and has 7 besides"):
        fisher.matvec({k: p for k, p in v.items() if k != "2.bias"} | {"7": v["2.bias"]})
    with pytest.raises(ValueError, match=r"must end in its shape \(5,\)"):
        fisher.matvec(v | {"0.bias": torch.zeros(4)})
    with pytest.raises(ValueError, match="not finite"):
        fisher.matvec(v | {"0.bias": torch.full((5,), float("inf"))})
    other = kfoc.fit(convolutional(), [images(4)])
    with pytest.raises(ValueError, match="none of its layers"):
        fisher.solve(v, preconditioner=curvature_of(other, "3"))
    model[0].bias.requires_grad_(False)
    whole = kfoc.Fisher(model, data)
    model[0].bias.requires_grad_(True)
    curvature = kfoc.fit(model, data)
    del v["0.bias"]
    with pytest.raises(ValueError, match=r"layer '0' is about 0\.weight, 0\.bias, and the Fisher"):
        whole.solve(v, preconditioner=curvature)
