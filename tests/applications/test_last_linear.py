"""Posteriors of a last linear layer in closed form, and variances without covariances."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import kfoc
from kfoc.applications.laplace import last_linear, linearised, predictive
from kfoc.model import sample_gradients
from kfoc.model.functional import Forward
from kfoc.parameters.layout import Layout

KINDS = {
    "K-FOC": kfoc.KFOC(),
    "K-FAC": kfoc.KFAC(),
    "diagonal": kfoc.Diagonal(),
    "EK-FOC": kfoc.EigenCorrected(kfoc.KFOC()),
    "dense": kfoc.BlockDiagonal(),
    "rank 2": kfoc.KFOC(rank=2),
}
CLOSED = ("K-FOC", "K-FAC", "diagonal", "EK-FOC")


def rows_of(model: nn.Module, layer: str, names: tuple[str, ...], x: Tensor) -> Tensor:
    """Jacobians (N, K, P) by [W | b], a backward pass per output."""
    module = model.get_submodule(layer)
    parameters = [getattr(module, name) for name in names]
    rows = []
    for sample in x:
        for output in model(sample[None]).flatten():
            found = torch.autograd.grad(output, parameters, retain_graph=True)
            rows.append(torch.cat([g.reshape(len(found[0]), -1) for g in found], 1).flatten())
    return torch.stack(rows).unflatten(0, (len(x), -1))


class Tokens(nn.Module):
    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(7, 4), nn.Linear(4, 3, bias=bias)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(torch.tanh(self.embedding(tokens)))


class Twice(Tokens):
    """Calls its head a second time, for nothing."""

    def forward(self, tokens: Tensor) -> Tensor:
        self.head(self.embedding(tokens))
        return super().forward(tokens)


def perceptron(bias: bool = True) -> nn.Module:
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 4, bias=bias))


MODELS: dict[str, tuple[Callable[[], nn.Module], str, Callable[[], Tensor]]] = {
    "perceptron": (perceptron, "2", lambda: torch.randn(6, 3)),
    "without a bias": (lambda: perceptron(False), "2", lambda: torch.randn(6, 3)),
    "the model itself": (lambda: nn.Linear(3, 4), "", lambda: torch.randn(6, 3)),
    "tokens": (Tokens, "head", lambda: torch.randint(7, (6, 2))),
    "called twice": (Twice, "head", lambda: torch.randint(7, (6, 2))),
    "tokens without a bias": (lambda: Tokens(False), "head", lambda: torch.randint(7, (6, 2))),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", MODELS)
def test_against_dense_algebra(case: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    make, layer, inputs = MODELS[case]
    model, x = make(), inputs()
    likelihood = kfoc.Categorical(class_dim=-1)
    curvature = kfoc.fit(
        model, [(x, None)], likelihood, layers=layer or None, fisher="exact", estimator=KINDS[kind]
    )
    laplace = kfoc.Laplace(model, curvature, 0.7, likelihood, num_samples=50)
    names = ("weight",) if "without" in case else ("weight", "bias")
    rows = rows_of(model, layer, names, x)
    precision = 50 * curvature[layer].to_dense() + 0.7 * torch.eye(rows.shape[-1])
    expected = rows @ precision.inverse() @ rows.mT
    if kind in CLOSED:
        monkeypatch.setattr(linearised, "jacobians", None)
    for size in (None, 4):
        found = laplace.linearised(x, chunk_size=size)
        torch.testing.assert_close(found.covariance, expected, rtol=1e-8, atol=1e-12)
        variance = expected.diagonal(dim1=1, dim2=2).reshape(found.mean.shape)
        torch.testing.assert_close(laplace.variances(x, chunk_size=size), variance)
    torch.testing.assert_close(found.mean, model(x).detach())


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(5, 4), nn.Linear(4, 5, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(torch.tanh(self.embedding(tokens)))


class Own(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).tanh()


class Fed(nn.Module):
    """The head's weight acts on its input too."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(functional.linear(x, self.head.weight).tanh())


class InPlace(nn.Module):
    """Changes what its head gave, and returns the same tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x).mul_(2)


def hooked() -> nn.Module:
    model = perceptron()
    model[2].register_forward_hook(lambda module, args, output: output * 2)
    return model


OTHERS: dict[str, tuple[Callable[[], nn.Module], str, Callable[[], Tensor]]] = {
    "a layer before": (perceptron, "0", lambda: torch.randn(6, 3)),
    "changed after it": (
        lambda: nn.Sequential(nn.Linear(3, 4), nn.Tanh()), "0", lambda: torch.randn(6, 3),
    ),
    "tied": (Tied, "head", lambda: torch.randint(5, (6, 2))),
    "of one's own": (lambda: nn.Sequential(Own(3, 4)), "0", lambda: torch.randn(6, 3)),
    "feeds itself": (Fed, "head", lambda: torch.randn(6, 3)),
    "in place": (InPlace, "head", lambda: torch.randn(6, 3)),
    "a hook": (hooked, "2", lambda: torch.randn(6, 3)),
    "a convolution": (
        lambda: nn.Sequential(nn.Conv2d(2, 3, 1)), "0", lambda: torch.randn(6, 2, 2, 2),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", OTHERS)
def test_where_the_closed_form_does_not_hold(case: str) -> None:
    """It is not taken, and the Jacobians of the layer as it is are."""
    make, layer, inputs = OTHERS[case]
    model, x = make(), inputs()
    module = model.get_submodule(layer)
    names = tuple(name for name, _ in module.named_parameters())
    outputs, inside = module.weight.shape[0], module.weight[0].numel() + len(names) - 1
    prefixed = tuple(f"{layer}.{name}" for name in names)
    layout = Layout(prefixed, tuple(tuple(p.shape) for p in module.parameters()))
    block = kfoc.KroneckerBlock(torch.eye(outputs), torch.eye(inside))
    curvature = kfoc.Curvature({layer: block}, 10, {layer: layout}, {})
    assert last_linear.inputs_of_last(Forward(model), {layer: layout}, x, 6) is None
    rows = rows_of(model, layer, names, x)
    laplace = kfoc.Laplace(model, curvature, 0.7)
    found = laplace.linearised(x).covariance
    torch.testing.assert_close(found, rows @ rows.mT / 10.7)
    spread = found.diagonal(dim1=1, dim2=2)
    torch.testing.assert_close(laplace.variances(x).flatten(1), spread)


def test_nothing_of_the_model_is_changed() -> None:
    model, x = perceptron(), torch.randn(6, 3, requires_grad=False)
    curvature = kfoc.fit(model, [(x, None)], layers="2")
    kfoc.Laplace(model, curvature).variances(x)
    assert not model[2]._forward_hooks
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_variances_of_images_take_some_outputs_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """No Jacobian of a whole sample is held, nor a covariance."""
    model, x = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Tanh(), nn.Conv2d(3, 3, 1)), None
    x = torch.randn(3, 2, 6, 6)
    curvature = kfoc.fit(model, [(x, None)])
    laplace = kfoc.Laplace(model, curvature)
    expected = laplace.linearised(x).variance
    held = []

    def watched(*args: object) -> dict[str, Tensor]:
        rows = jacobians(*args)
        held.append(sum(row.numel() for row in rows.values()))
        return rows

    jacobians = linearised.jacobians
    monkeypatch.setattr(linearised, "jacobians", watched)
    monkeypatch.setattr(linearised, "covariance_of_rows", None)
    monkeypatch.setattr(predictive, "OutputGaussian", None)
    monkeypatch.setattr(sample_gradients, "CHUNK_NUMBERS", 1000)
    torch.testing.assert_close(laplace.variances(x), expected)
    assert max(held) <= 1000
    assert len(held) > 3
    found = laplace.probabilities(x)
    logits = model(x).detach() / (1 + torch.pi / 8 * expected).sqrt()
    torch.testing.assert_close(found, logits.softmax(1))


@pytest.mark.filterwarnings("ignore:the best .* is the (small|larg)est candidate:RuntimeWarning")
def test_the_table_of_held_out_losses() -> None:
    """Every prior precision at every temperature, and the network by itself."""
    model, x, y = perceptron(), torch.randn(40, 3), torch.randint(4, (40,))
    curvature = kfoc.fit(model, [(x, y)], layers="2", fisher="exact")
    laplace = kfoc.Laplace(model, curvature)
    held_out = [(x[:15] + 0.1, y[:15]), (x[15:] + 0.1, y[15:])]
    found = laplace.validated(held_out, [0.1, 1.0, 10.0], temperatures=[0.5, 1.0, 3.0])
    rows = rows_of(model, "2", ("weight", "bias"), x + 0.1)
    logits = model(x + 0.1).detach()
    assert found.plain == pytest.approx(functional.cross_entropy(logits, y).item())
    assert len(found.losses) == 9
    for (prior, temperature), loss in found.losses.items():
        precision = 40 / temperature * curvature["2"].to_dense() + prior * torch.eye(24)
        variance = torch.einsum("nkp,pq,nkq->nk", rows, precision.inverse(), rows)
        moderated = logits / (1 + torch.pi / 8 * variance).sqrt()
        assert loss == pytest.approx(functional.cross_entropy(moderated, y).item())
    assert found.losses[found.best] == min(found.losses.values())
    lines = str(found).splitlines()
    assert lines[1].split() == ["network", "by", "itself", f"{found.plain:.4f}"]
    assert len(lines) == 11
    assert sum("best" in line for line in lines) == 1
    tuned = laplace.tuned_by_validation(held_out, [0.1, 1.0, 10.0], temperatures=[0.5, 1.0, 3.0])
    assert (tuned.prior_precision, tuned.temperature) == found.best
    assert tuned._factorised is laplace._factorised
    with pytest.raises(ValueError, match="must hold at least one number each"):
        laplace.validated(held_out, temperatures=[])


def test_a_warning_for_the_last_temperature() -> None:
    model, x, y = perceptron(), torch.randn(40, 3), torch.randint(4, (40,))
    curvature = kfoc.fit(model, [(x, y)], layers="2", fisher="exact")
    laplace = kfoc.Laplace(model, curvature)
    table = laplace.validated([(x, y)], [1.0], temperatures=[0.5, 1.0])
    edge = "smallest" if table.best[1] == 0.5 else "largest"
    with pytest.warns(RuntimeWarning, match=f"the best temperature is the {edge} candidate"):
        laplace.tuned_by_validation([(x, y)], [1.0], temperatures=[0.5, 1.0])
