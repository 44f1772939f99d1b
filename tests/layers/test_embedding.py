"""Embeddings, and weights shared with a head, against dense per-sample gradients by autograd."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import kfoc
import oracle
from every_layer import check_every_block
from kfoc.plans.tokens import TiedTokens, TokenPairs
from kfoc.samples import one_hot as tokens
from kfoc.samples.linear import Samples
from kfoc.samples.one_hot import OneHot

EXACT: dict[str, Any] = {"likelihood": "gaussian", "fisher": "exact"}


def gradients(model: nn.Module, parameter: Tensor, inputs: Tensor, cotangents: Tensor) -> Tensor:
    """Per-sample gradients by one backward pass each, (S, N, *parameter)."""
    rows = []
    for cotangent in cotangents:
        for n in range(len(inputs)):
            output = model(inputs[n : n + 1])
            (grad,) = torch.autograd.grad(
                output, parameter, cotangent[n : n + 1], allow_unused=True
            )
            rows.append(torch.zeros_like(parameter) if grad is None else grad.to_dense())
    return torch.stack(rows).view(len(cotangents), len(inputs), *parameter.shape)


def block_of(gradient: Tensor) -> Tensor:
    """(S, N, o, i) -> F."""
    rows = gradient.flatten(0, 1).flatten(1)
    return rows.mT @ rows / gradient.shape[1]


def diagonal_optimum(fisher: Tensor, o: int, i: int) -> tuple[Tensor, float]:
    """The closest `kron(left, diag(right))`, dense, and its relative error, by the SVD."""
    whole = oracle.rearranged(fisher, o, i)
    kept = whole[:, torch.arange(i) * (i + 1)]
    u, s, v = torch.linalg.svd(kept, full_matrices=False)
    best = s[0] * torch.kron(u[:, 0].view(o, o), torch.diag(v[0]))
    return best, oracle.relative_error(fisher, best)


class Embedded(nn.Module):
    """Tokens through an embedding and a nonlinearity; outputs (N, 4)."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 3, **options)
        self.head = nn.Linear(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.embedding(x)).flatten(1).unflatten(1, (-1, 3))
        weights = torch.arange(1.0, hidden.shape[1] + 1)[:, None].to(hidden)
        return self.head((hidden * weights).sum(1)).sin()


class Called(Embedded):
    """Calls the embedding twice."""

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.embedding(x) * self.embedding(x.flip(1))).sum(1)).sin()


MODELS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "one token": (Embedded, (9,)),
    "sequence": (Embedded, (9, 5)),
    "two axes": (Embedded, (9, 2, 3)),
    "padding": (lambda: Embedded(padding_idx=2), (9, 5)),
    "sparse": (lambda: Embedded(sparse=True), (9, 5)),
    "twice": (Called, (9, 4)),
}


@pytest.fixture
def large(monkeypatch: pytest.MonkeyPatch) -> None:
    """The vocabularies of these tests count as large."""
    monkeypatch.setattr(tokens, "FULL_VOCABULARY", 5)


def case(name: str) -> tuple[nn.Module, Tensor, Tensor]:
    """Model, tokens, and the per-sample gradients of weight^T, (S, N, 3, 7)."""
    build, shape = MODELS[name]
    model, x = build(), torch.randint(7, shape)
    cotangents = oracle.gaussian_exact(model(x).detach())
    return model, x, gradients(model, model.embedding.weight, x, cotangents).mT


def split(x: Tensor, size: int) -> list[tuple[Tensor, None]]:
    return [(part, None) for part in x.split(size)]


def fitted(model: nn.Module, data: Any, estimator: kfoc.Estimator, **options: Any) -> kfoc.Block:
    return kfoc.fit(model, data, estimator=estimator, layers="embedding", **EXACT, **options)[
        "embedding"
    ]


def close(found: Tensor, expected: Tensor, rtol: float = 1e-7) -> None:
    torch.testing.assert_close(found, expected, rtol=rtol, atol=1e-8 * expected.abs().max().item())


@pytest.mark.parametrize("name", MODELS)
def test_small_vocabularies_in_full(name: str) -> None:
    model, x, gradient = case(name)
    fisher = block_of(gradient)
    best, _, error = oracle.optimum(fisher, 3, 7)
    data = split(x, 4)
    close(fitted(model, data, kfoc.BlockDiagonal()).to_dense(), fisher)
    close(fitted(model, data, kfoc.Diagonal()).to_dense(), torch.diag(fisher.diagonal()))
    for plan in kfoc.estimators.kfoc.PLANS:
        if x.ndim > 1 and plan in ("gram", "primal"):
            continue
        block = fitted(model, [(x, None)], kfoc.KFOC(plan=plan, rtol=0))
        close(block.to_dense(), best)
        oracle.assert_psd_and_symmetric(block.right)
    block = fitted(model, data, kfoc.KFOC("exact", rtol=0, buffer=0, passes=60))
    close(block.to_dense(), best)
    for aggregation in ("running", "approx"):
        block = fitted(model, data, kfoc.KFOC(aggregation))
        assert error <= oracle.relative_error(fisher, block.to_dense()) < 1


@pytest.mark.parametrize("name", MODELS)
def test_large_vocabularies_by_diagonals(name: str, large: None) -> None:
    model, x, gradient = case(name)
    fisher = block_of(gradient)
    best, error = diagonal_optimum(fisher, 3, 7)
    block = fitted(model, [(x, None)], kfoc.KFOC(rtol=0))
    assert oracle.relative_error(fisher, block.to_dense()) == pytest.approx(error, rel=1e-8)
    assert isinstance(block, kfoc.KroneckerDiagonalBlock)
    assert block.right.shape == (7,)
    assert (block.right >= 0).all()
    oracle.assert_psd_and_symmetric(block.left)
    close(block.to_dense(), best)
    usual = fitted(model, [(x, None)], kfoc.KFOC())
    assert oracle.relative_error(fisher, usual.to_dense()) == pytest.approx(error, rel=1e-4)
    if name == "one token":
        close(block.to_dense(), oracle.optimum(fisher, 3, 7)[0])
    exact = kfoc.KFOC("exact", rtol=0, buffer=0, passes=60)
    close(fitted(model, split(x, 4), exact).to_dense(), best)
    close(fitted(model, split(x, 4), kfoc.KFOC(rtol=0)).to_dense(), best)  # all in the buffer
    diagonal = fitted(model, split(x, 4), kfoc.Diagonal())
    close(diagonal.to_dense(), torch.diag(fisher.diagonal()))
    close(fitted(model, split(x, 4), kfoc.BlockDiagonal()).to_dense(), fisher)


@pytest.mark.parametrize("aggregation", ["online", "running", "approx"])
@pytest.mark.parametrize("size", [1, 8, 60])
def test_aggregations_of_diagonals(aggregation: str, size: int, large: None) -> None:
    model, x = Embedded(), torch.randint(7, (240, 4))
    x[:60] = x[:60].clamp(max=2)  # tokens differ between batches
    x = x[torch.randperm(240)]
    gradient = gradients(model, model.embedding.weight, x, oracle.gaussian_exact(model(x).detach()))
    fisher = block_of(gradient.mT)
    _, error = diagonal_optimum(fisher, 3, 7)
    block = fitted(model, split(x, size), kfoc.KFOC(aggregation, buffer=0))
    found = oracle.relative_error(fisher, block.to_dense())
    slack = {"online": 0.01, "running": 0.05, "approx": 0.5}[aggregation]
    assert error - 1e-9 <= found <= error + slack
    assert (block.right >= 0).all()


def test_decay_over_diagonals(large: None) -> None:
    """Old batches fade: with a strong decay the last batch alone is left."""
    model, x = Embedded(), torch.randint(7, (24, 4))
    cotangents = oracle.gaussian_exact(model(x).detach())
    fisher = block_of(gradients(model, model.embedding.weight, x, cotangents)[:, -8:].mT)
    _, error = diagonal_optimum(fisher, 3, 7)
    block = fitted(model, split(x, 8), kfoc.KFOC(decay=1e-9))
    assert error <= oracle.relative_error(fisher, block.to_dense()) < error + 0.02


@pytest.mark.parametrize("name", MODELS)
def test_kfac_is_that_of_the_linear_layer(name: str, large: None) -> None:
    model, x, _ = case(name)
    # The embedding as a linear layer of one-hot rows, zero where padded.
    seen: list[Tensor] = []
    derivatives = []
    with torch.enable_grad():
        handle = model.embedding.register_forward_hook(
            lambda module, args, output: seen.append(output) or None
        )
        output = model(x)
        handle.remove()
    for cotangent in oracle.gaussian_exact(output.detach()):
        grads = torch.autograd.grad(output, seen, cotangent, retain_graph=True)
        derivatives.append(torch.cat([g.reshape(len(x), -1, 3) for g in grads], 1))
    g = torch.stack(derivatives)  # (S, N, T, 3)
    left = torch.einsum("snti,sntj->ij", g, g) / (len(x) * g.shape[2])
    counts = torch.bincount(x.flatten(), minlength=7) * (1.0 / len(x)) * len(seen)
    if model.embedding.padding_idx is not None:
        counts[model.embedding.padding_idx] = 0
    expected = torch.kron(left, torch.diag(counts))
    block = fitted(model, split(x, 4), kfoc.KFAC())
    assert isinstance(block, kfoc.KroneckerDiagonalBlock)
    close(block.to_dense(), expected)


@pytest.mark.parametrize("name", MODELS)
def test_kfac_in_full_is_the_same_where_inputs_are_tokens(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x, _ = case(name)
    block = fitted(model, split(x, 4), kfoc.KFAC())
    assert isinstance(block, kfoc.KroneckerBlock)
    monkeypatch.setattr(tokens, "FULL_VOCABULARY", 5)
    close(block.to_dense(), fitted(model, split(x, 4), kfoc.KFAC()).to_dense())


def test_the_certificate_is_of_the_whole_block(large: None) -> None:
    """One small batch comes with its error for free, and probes estimate it for any."""
    model, x, gradient = case("sequence")
    fisher = block_of(gradient)
    inputs = OneHot(x, 7, torch.float64)
    grads = torch.randn(1, 9, 5, 3)
    contraction = TokenPairs(Samples(inputs, grads))
    whole = block_of(Samples(inputs, grads).gradients(0, 9)) * 9
    assert contraction.squared_norm() == pytest.approx(whole.norm().item() ** 2)
    two = Samples(inputs, torch.randn(2, 9, 5, 3))
    whole = block_of(two.gradients(0, 9)) * 9
    assert TokenPairs(two).squared_norm() == pytest.approx(whole.norm().item() ** 2)
    for estimator in (kfoc.KFOC(), kfoc.KFAC(), kfoc.Diagonal()):
        block = fitted(model, split(x, 4), estimator, probes=400)
        true = oracle.relative_error(fisher, block.to_dense())
        assert block.relative_error == pytest.approx(true, abs=4 * block.report.standard_error)
        assert block.report.standard_error < 0.05


def test_probes_give_exact_products(large: None) -> None:
    x = torch.randint(-1, 7, (9, 5))
    samples = Samples(OneHot(x, 7, torch.float64), torch.randn(2, 9, 5, 3))
    dense = block_of(samples.gradients(0, 9)) * 9
    probes = kfoc.estimators.certificate.Probes(3, 0, "layer", samples)
    small = Samples(samples.inputs, samples.grads * 1e-3).part(0, 4)
    dense += 2 * block_of(small.gradients(0, 4)) * 4
    probes.add(small)  # its unit is another one
    probes.add(samples.part(0, 4))
    probes.add(small.silent(3))
    probes.add(samples.part(4, 9))
    probes.add(small)
    found = probes.products.flatten(1) * probes.unit
    close(found, probes.vectors.flatten(1) @ dense)


def test_a_certificate_for_free(large: None) -> None:
    """Few pairs against a wide embedding."""
    model = nn.Sequential(nn.Embedding(9, 20), nn.Tanh(), nn.Flatten(), nn.Linear(40, 1))
    x = torch.randint(9, (12, 2))
    gradient = gradients(model, model[0].weight, x, oracle.gaussian_exact(model(x).detach()))
    fisher = block_of(gradient.mT)
    _, error = diagonal_optimum(fisher, 20, 9)
    block = kfoc.fit(model, [(x, None)], estimator=kfoc.KFOC(rtol=0), layers="0", **EXACT)["0"]
    assert block.relative_error == pytest.approx(error, rel=1e-8)


@pytest.mark.parametrize("scale", [1e-9, 1e9])
def test_extreme_gradients_in_float32(scale: float, large: None) -> None:
    model, x, _ = case("sequence")
    reference = fitted(model, split(x, 4), kfoc.KFOC())
    model.float()
    block = fitted(model, split(x, 4), kfoc.KFOC(), predict=lambda m, t: m(t) * scale)
    assert block.left.dtype == block.right.dtype == torch.float32
    for found, expected in ((block.left, reference.left), (block.right, reference.right)):
        torch.testing.assert_close(found.double() / scale, expected, rtol=1e-3, atol=1e-5)


def test_a_vocabulary_of_fifty_thousand(monkeypatch: pytest.MonkeyPatch) -> None:
    """No (V, V) matrix, which would not fit in this test, and no one-hot row is ever formed."""

    def refuse(*_: Any) -> Tensor:
        raise AssertionError("one-hot rows of a large vocabulary")

    monkeypatch.setattr(OneHot, "rows", refuse)
    model = nn.Sequential(nn.Embedding(50_000, 8), nn.Flatten(), nn.Linear(8 * 16, 3)).float()
    data = split(torch.randint(50_000, (64, 16)), 32)
    for estimator in (kfoc.KFOC(), kfoc.KFAC(), kfoc.Diagonal(), kfoc.KFOC("exact", buffer=0)):
        block = kfoc.fit(model, data, "categorical", estimator=estimator, probes=2)["0"]
        assert block.shape == (8, 50_000)
        assert 0 < block.relative_error < 1.1


def test_matvec_of_a_diagonal_block() -> None:
    block = kfoc.KroneckerDiagonalBlock(torch.randn(3, 3), torch.rand(5))
    vectors = torch.randn(2, 3, 5)
    close(block.matvec(vectors).flatten(1), vectors.flatten(1) @ block.to_dense().mT)
    with pytest.raises(ValueError, match=r"must end in the shape \(3, 5\)"):
        block.matvec(vectors.mT)


class Switching(nn.Module):
    """Reaches its embedding in the batches whose first token is not 0."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 3)
        self.head = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.embedding(x) if x[0, 0] else torch.ones(*x.shape, 3)
        return self.head(hidden).sin().sum(1)


@pytest.mark.parametrize("limit", [5, 1024])
def test_an_embedding_out_of_the_outputs_reach(limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokens, "FULL_VOCABULARY", limit)

    class Dead(Embedded):
        def forward(self, x: Tensor) -> Tensor:
            self.embedding(x)
            return self.head(torch.ones(len(x), 3))

    x = torch.randint(7, (6, 4))
    for estimator in (kfoc.KFOC(), kfoc.KFAC(), kfoc.Diagonal(), kfoc.KFOC("running")):
        block = fitted(Dead(), split(x, 3), estimator)
        assert not block.to_dense().any()
        assert block.to_dense().dtype == torch.float64


@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("limit", [5, 1024])
def test_batches_that_do_not_reach_the_embedding(
    first: int, limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokens, "FULL_VOCABULARY", limit)
    model, x = Switching(), torch.randint(1, 7, (6, 4))
    x[3 * first, 0] = 0  # the first of one of the two batches
    data = split(x, 3)
    reached = x[3:] if first == 0 else x[:3]
    alone = fitted(model, [(reached, None)], kfoc.KFOC(rtol=0)).to_dense()
    for estimator in (kfoc.KFOC(rtol=0), kfoc.KFOC("running", rtol=0), kfoc.KFOC("exact", rtol=0)):
        close(fitted(model, data, estimator).to_dense(), alone / 2, 1e-6)


class Positions(nn.Module):
    """Adds the embedding of the positions, called once for all samples."""

    def __init__(self, steps: int) -> None:
        super().__init__()
        self.words, self.positions = nn.Embedding(7, 3), nn.Embedding(steps, 3)
        self.steps = torch.arange(steps)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.words(x) + self.positions(self.steps)).sum(1)


def test_positions_that_look_like_samples_are_found() -> None:
    model, x = Positions(4), torch.randint(7, (4, 4))
    curvature = check_every_block(model, x)
    assert curvature.layouts["positions"].kind == "flat"  # its gradients were taken one by one


def test_what_cannot_be_treated() -> None:
    for embedding, reason in (
        (nn.Embedding(7, 3, scale_grad_by_freq=True), "scale_grad_by_freq makes gradients"),
        (nn.Embedding(7, 3).requires_grad_(False), "are frozen"),
    ):
        model = nn.Sequential(embedding, nn.Linear(3, 2))
        x = torch.randint(7, (5,))
        assert reason in kfoc.fit(model, [(x, None)], "gaussian").skipped["0"]
        with pytest.raises(ValueError, match=reason):
            kfoc.fit(model, [(x, None)], "gaussian", layers=["0", "1"])
    for embedding, reason in (
        (nn.Embedding(7, 3, max_norm=1.0), "max_norm changes the weight"),
        (nn.EmbeddingBag(7, 3), "bags have no position"),
    ):
        with pytest.raises(kfoc.Unsupported, match=reason):
            kfoc.layers.rule.checked_treatment(embedding)
    model = nn.Sequential(nn.EmbeddingBag(7, 3), nn.Linear(3, 2))
    assert check_every_block(model, torch.randint(7, (5, 2))).layouts["0"].kind == "flat"
    with pytest.raises(ValueError, match="not floating point"):
        kfoc.fit(nn.Linear(3, 2), [(torch.ones(5, 3, dtype=torch.long), None)], "gaussian")


class Tied(nn.Module):
    """A language model whose head shares the embedding's weight; outputs (N, T, 6)."""

    def __init__(self, head_first: bool = False, padding_idx: int | None = None) -> None:
        super().__init__()
        names = ["head", "embedding"] if head_first else ["embedding", "head"]
        for name in names:
            layer = (
                nn.Embedding(6, 3, padding_idx=padding_idx)
                if name == "embedding"
                else nn.Linear(3, 6, bias=False)
            )
            setattr(self, name, layer)
        self.head.weight = self.embedding.weight
        self.mix = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.mix(self.embedding(x).cumsum(1)))
        return self.head(hidden)


TIED = {
    "embedding first": (Tied, "embedding"),
    "head first": (lambda: Tied(head_first=True), "head"),
    "padding": (lambda: Tied(padding_idx=1), "embedding"),
}


@pytest.mark.parametrize("steps", [1, 2, 4])
@pytest.mark.parametrize("name", TIED)
@pytest.mark.parametrize("fisher", ["exact", "empirical"])
def test_tied_weights(name: str, steps: int, fisher: str) -> None:
    """One direction goes by positions, several by positions of each or by unit vectors."""
    build, first = TIED[name]
    model, x, y = build(), torch.randint(6, (7, steps)), torch.randint(6, (7, steps))
    outputs = model(x).detach()
    if fisher == "exact":
        cotangents = oracle.gaussian_exact(outputs)
        options: dict[str, Any] = {"likelihood": "gaussian", "fisher": "exact"}
    else:
        cotangents = (nn.functional.one_hot(y, 6) - outputs.softmax(-1))[None]
        options = {"likelihood": "categorical", "fisher": "empirical"}
    gradient = gradients(model, model.embedding.weight, x, cotangents)
    block = block_of(gradient)
    best, _, _ = oracle.optimum(block, 6, 3)
    data = list(zip(x.split(3), y.split(3), strict=True))
    if options["likelihood"] == "gaussian":
        data = split(x, 3)

    def found(estimator: kfoc.Estimator, **more: Any) -> kfoc.Block:
        curvature = kfoc.fit(model, data, estimator=estimator, **options, **more)
        other = ({"head", "embedding"} - {first}).pop()
        assert "its parameters are in the block of" in curvature.skipped[other]
        assert curvature.parameters[first] == (f"{first}.weight",)
        assert curvature.layouts[first].shape == (6, 3)
        return curvature[first]

    close(found(kfoc.BlockDiagonal()).to_dense(), block)
    close(found(kfoc.Diagonal()).to_dense(), torch.diag(block.diagonal()))
    for estimator in (
        kfoc.KFOC(rtol=0),
        kfoc.KFOC("exact", rtol=0, buffer=0, passes=80),
        kfoc.KFOC("exact", rtol=0, buffer=0, passes=80, plan="gradients"),
    ):
        close(found(estimator).to_dense(), best)
    certified = found(kfoc.KFAC(), probes=300)
    true = oracle.relative_error(block, certified.to_dense())
    assert certified.relative_error == pytest.approx(true, abs=4 * certified.report.standard_error)


def test_tied_directions_with_positions_of_their_own() -> None:
    """Two directions, few positions and a wide weight: neither of the other two ways."""
    embedding = Samples(
        OneHot(torch.randint(6, (5, 2)), 6, torch.float64), 1e-4 * torch.randn(2, 5, 2, 9)
    )
    head = Samples(kfoc.Rows(torch.randn(5, 2, 9)), 1e-4 * torch.randn(2, 5, 2, 6))
    tied = kfoc.samples.tied.Tied(head, embedding)
    flat = tied.as_positions()
    assert flat.num_positions == 6
    onehot = nn.functional.one_hot(embedding.inputs.tensor, 6).double()
    expected = torch.einsum("snto,nti->snoi", head.grads, head.inputs.tensor)
    expected += torch.einsum("nto,snti->snoi", onehot, embedding.grads)
    close(flat.gradients(0, 5), expected)
    close(tied.gradients(0, 5), expected)
    rescaled, scale = tied.rescaled()
    assert scale < 1e-6
    close(rescaled.gradients(0, 5) * scale**0.5, expected)


@pytest.mark.parametrize("mc_samples", [1, 3])
@pytest.mark.parametrize("limit", [5, 1024])
def test_kfac_of_tied_weights_is_closest_to_the_sum(
    mc_samples: int, limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The two uses, each as K-FAC has it when the weights are not shared."""
    model, x = Tied(), torch.randint(6, (7, 4))
    data = split(x, 4)
    options: dict[str, Any] = {"estimator": kfoc.KFAC(), "mc_samples": mc_samples}
    apart = Tied()
    apart.load_state_dict(model.state_dict())
    apart.head.weight = nn.Parameter(model.embedding.weight.detach().clone())
    parts = kfoc.fit(apart, data, **options)
    monkeypatch.setattr(tokens, "FULL_VOCABULARY", limit)
    block = kfoc.fit(model, data, **options)["embedding"]
    head, embedding = parts["head"], parts["embedding"]
    if limit == 1024:
        total = torch.kron(head.left, head.right) + torch.kron(embedding.right, embedding.left)
        close(block.to_dense(), oracle.optimum(total, 6, 3)[0])
        return
    total = torch.kron(head.right, torch.diag(head.left.diagonal()))
    total += torch.kron(embedding.left, embedding.right)
    close(block.to_dense(), diagonal_optimum(total, 3, 6)[0])


@pytest.mark.parametrize("steps", [1, 2, 4])
@pytest.mark.parametrize("name", TIED)
@pytest.mark.parametrize("fisher", ["exact", "empirical"])
def test_tied_weights_of_large_vocabularies(
    name: str, steps: int, fisher: str, large: None
) -> None:
    """About weight^T, (d, V), with a diagonal over the vocabulary."""
    build, first = TIED[name]
    model, x, y = build(), torch.randint(6, (7, steps)), torch.randint(6, (7, steps))
    outputs = model(x).detach()
    cotangents = oracle.gaussian_exact(outputs)
    options: dict[str, Any] = {"likelihood": "gaussian", "fisher": "exact"}
    data: list[Any] = split(x, 3)
    if fisher == "empirical":
        cotangents = (nn.functional.one_hot(y, 6) - outputs.softmax(-1))[None]
        options = {"likelihood": "categorical", "fisher": "empirical"}
        data = list(zip(x.split(3), y.split(3), strict=True))
    block = block_of(gradients(model, model.embedding.weight, x, cotangents).mT)
    best, error = diagonal_optimum(block, 3, 6)

    def found(estimator: kfoc.Estimator, **more: Any) -> kfoc.Block:
        curvature = kfoc.fit(model, data, estimator=estimator, **options, **more)
        assert curvature.layouts[first].shape == (3, 6)
        return curvature[first]

    close(found(kfoc.BlockDiagonal()).to_dense(), block)
    close(found(kfoc.Diagonal()).to_dense(), torch.diag(block.diagonal()))
    for estimator in (kfoc.KFOC(rtol=0), kfoc.KFOC("exact", rtol=0, buffer=0, passes=80)):
        optimum = found(estimator)
        assert isinstance(optimum, kfoc.KroneckerDiagonalBlock)
        oracle.assert_psd_and_symmetric(optimum.left)
        close(optimum.to_dense(), best)
    usual = oracle.relative_error(block, found(kfoc.KFOC()).to_dense())
    assert usual == pytest.approx(error, rel=1e-4)
    for aggregation in ("online", "running", "approx"):
        one = found(kfoc.KFOC(aggregation, buffer=0), probes=300)
        true = oracle.relative_error(block, one.to_dense())
        assert error - 1e-9 <= true < 1
        assert one.relative_error == pytest.approx(true, abs=4 * one.report.standard_error)


def test_the_norm_of_large_tied_weights(large: None) -> None:
    head = Samples(kfoc.Rows(torch.randn(5, 2, 3)), torch.randn(2, 5, 2, 6))
    tokens = OneHot(torch.randint(6, (5, 2)), 6, torch.float64)
    tied = kfoc.samples.tied.Tied(head, Samples(tokens, torch.randn(2, 5, 2, 3)))
    whole = block_of(tied.gradients(0, 5)) * 5
    assert TiedTokens(tied).squared_norm() == pytest.approx(whole.norm().item() ** 2)


def test_ties_are_named_by_their_first_module() -> None:
    model, x = Tied(), torch.randint(6, (5, 3))
    assert kfoc.fit(model, [(x, None)], layers="embedding").layers == ("embedding",)
    assert kfoc.fit(model, [(x, None)], layers="head").layers == ("head",)
    both = kfoc.fit(model, [(x, None)])
    assert both.layers == ("embedding", "mix")
    assert both.skipped == {"head": "its parameters are in the block of 'embedding'"}
    model.head = nn.Linear(3, 6)
    model.head.weight = model.embedding.weight
    with pytest.raises(kfoc.Unsupported, match="has a bias of its own"):
        kfoc.layers.tied.tied_treatment(model.embedding, model.head)
    assert check_every_block(model, x).layouts["embedding"].kind == "flat"


class Used(Tied):
    """Uses the shared weight once more, outside of both."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.embedding.weight.sum()


def test_a_third_use_of_a_tied_weight_is_found() -> None:
    curvature = check_every_block(Used(), torch.randint(6, (5, 3)))
    assert curvature.layouts["embedding"].kind == "flat"


class OneUse(Tied):
    """Calls one of the two alone."""

    def __init__(self, use: str) -> None:
        super().__init__()
        self.use = use

    def forward(self, x: Tensor) -> Tensor:
        if self.use == "embedding":
            return torch.tanh(self.embedding(x)).sum(1)
        return torch.tanh(self.head(x[..., None] * torch.ones(3))).sum(1)


@pytest.mark.parametrize("use", ["embedding", "head"])
def test_one_use_of_a_tied_weight(use: str) -> None:
    model, x = OneUse(use), torch.randint(6, (5, 3))
    cotangents = oracle.gaussian_exact(model(x).detach())
    block = block_of(gradients(model, model.embedding.weight, x, cotangents))
    found = kfoc.fit(model, [(x, None)], estimator=kfoc.KFOC(rtol=0), layers="embedding", **EXACT)
    close(found["embedding"].to_dense(), oracle.optimum(block, 6, 3)[0])


def test_layers_with_enormous_factors_are_left_out_unless_named() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 50_257, device="meta"))
    chosen = kfoc.layers.select.select(model, None, kfoc.KFOC().largest_factor)
    assert "left factor would have 50257^2 entries" in chosen.skipped["1"]
    assert "1" in kfoc.layers.select.select(model, ["1"], kfoc.KFAC().largest_factor).layers
    assert "1" in kfoc.layers.select.select(model, None, kfoc.Diagonal().largest_factor).layers
    wide = nn.Sequential(nn.Linear(2**14, 1), nn.Flatten())
    with pytest.raises(ValueError, match="right factor would have 16385"):
        kfoc.fit(wide, [(torch.randn(2, 2**14), None)], "gaussian")
