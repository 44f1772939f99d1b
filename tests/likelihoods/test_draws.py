"""Weighted draws: what they have to expect, what has no variance, and what is exact at once."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from torch import Tensor, nn

import kfoc
import oracle
from kfoc.likelihoods import softmax
from kfoc.likelihoods.draws import Draws
from models import trained

# Outputs with several label places a sample, and how a dense oracle has their Fisher.
CASES = {
    "classes": (kfoc.Categorical(), (2, 4)),
    "sequence": (kfoc.Categorical(class_dim=-1), (2, 3, 4)),
    "image": (kfoc.Categorical(class_dim=1), (2, 3, 2, 2)),
    "gaussian": (kfoc.Gaussian(), (2, 2, 3)),
    "bernoulli": (kfoc.Bernoulli(), (2, 5)),
}


def drawn(
    likelihood: kfoc.Likelihood, outputs: Tensor, count: int = 1, fisher: str = "mc", seed: int = 0
) -> Tensor:
    """(count, N, ...), without the scale of `1 / sqrt(count)`."""
    found = likelihood.cotangents(outputs, None, fisher, count, seed, 0)
    return torch.stack(list(found)) * count**0.5


def repeated(likelihood: kfoc.Likelihood, outputs: Tensor, count: int, draws: int = 1) -> Tensor:
    """Of `count` samples with the same outputs each, (count, draws, N, ...)."""
    many = outputs.repeat(count, *[1] * (outputs.ndim - 1))
    found = drawn(likelihood, many, draws, seed=1)
    return found.unflatten(1, (count, len(outputs))).transpose(0, 1)


def label(residual: Tensor) -> Tensor:
    """The class c of a multiple of e_c - p: it alone has its sign."""
    signs = residual.sign()
    return (signs == -signs.sum(-1, keepdim=True).sign()).int().argmax(-1)


def covariance(likelihood: kfoc.Likelihood, outputs: Tensor) -> Tensor:
    """Of the score, (N, P, P), by the textbook; zero between places."""
    if isinstance(likelihood, kfoc.Categorical):
        dim = likelihood.class_dim if likelihood.class_dim is not None else 1
        size = outputs[0].numel()
        index = torch.arange(size).view(outputs[:1].shape).movedim(dim, -1).flatten(0, -2)
        p = outputs.softmax(dim).flatten(1)
        full = torch.zeros(len(outputs), size, size)
        for place in index:
            q = p[:, place]
            block = torch.diag_embed(q) - q[:, :, None] * q[:, None, :]
            full[:, place[:, None], place[None, :]] = block
        return full
    if isinstance(likelihood, kfoc.Gaussian):
        return torch.eye(outputs[0].numel()).expand(len(outputs), -1, -1)
    p = outputs.sigmoid().flatten(1)
    return torch.diag_embed(p - p**2)


@pytest.mark.parametrize("draws", [1, 3])
@pytest.mark.parametrize("name", CASES)
def test_unbiased_between_places_too(name: str, draws: int) -> None:
    """Every entry within five standard errors; the mean too, or cross terms would not vanish."""
    likelihood, shape = CASES[name]
    outputs, count = 2 * torch.randn(shape), 3000
    flat = repeated(likelihood, outputs, count, draws).flatten(3)
    products = torch.einsum("kmnp,kmnq->knpq", flat, flat) / draws
    error = products.std(0) / count**0.5
    exact = covariance(likelihood, outputs)
    assert ((products.mean(0) - exact).abs() <= 5 * error + 1e-12).all()
    means = flat.mean(1)
    assert (means.mean(0).abs() <= 5 * means.std(0) / count**0.5 + 1e-12).all()


@pytest.mark.parametrize("name", CASES)
def test_the_size_of_a_draw_is_known(name: str) -> None:
    """|cotangent|^2 at each place is the trace of the covariance there, whatever is drawn."""
    likelihood, shape = CASES[name]
    outputs = 3 * torch.randn(shape)
    sizes = repeated(likelihood, outputs, 40)[:, 0].square()
    if isinstance(likelihood, kfoc.Categorical):
        dim = likelihood.class_dim if likelihood.class_dim is not None else 1
        found = sizes.sum(1 + dim % len(shape))
        expected = 1 - outputs.softmax(dim).square().sum(dim)
    else:
        found = sizes.flatten(2)
        expected = covariance(likelihood, outputs).diagonal(dim1=1, dim2=2)
    torch.testing.assert_close(found, expected.expand_as(found), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(
    ("likelihood", "outputs"),
    [
        (kfoc.Categorical(), torch.tensor([[1.0, -2.0], [30.0, 0.0], [-3.0, 4.0]])),
        (kfoc.Gaussian(), torch.zeros(3, 1)),
        (kfoc.Bernoulli(), torch.tensor([[-4.0], [0.3], [30.0]])),
    ],
    ids=["two classes", "one mean", "one logit"],
)
@pytest.mark.parametrize("count", [1, 3])
def test_exact_with_one_dimension_to_vary_in(
    likelihood: kfoc.Likelihood, outputs: Tensor, count: int
) -> None:
    flat = drawn(likelihood, outputs.double(), count)
    exact = torch.stack(list(likelihood.exact(outputs.double(), None)))
    expected = torch.einsum("snp,snq->npq", exact, exact)
    products = torch.einsum("snp,snq->npq", flat, flat) / count
    torch.testing.assert_close(products, expected, rtol=1e-12, atol=0)


def one_sure(rest: Fraction, classes: int = 4) -> tuple[list[Fraction], Tensor]:
    """Probabilities 1 - rest and what the others share, 1 : 2 : ..., and logits of them."""
    shares = [rest * k / sum(range(1, classes)) for k in range(1, classes)]
    p = [1 - rest, *shares]
    logits = torch.tensor([0.0, *(float(share / p[0]) for share in shares)])
    return p, torch.cat([logits[:1], logits[1:].log()])[None]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("exponent", [1, 6, 9, 12, 18])
def test_sure_models_keep_their_digits(exponent: int, dtype: torch.dtype) -> None:
    """Every kind of Fisher, p up to 1 - 1e-18, against arithmetic in fractions."""
    p, logits = one_sure(Fraction(1, 10**exponent))
    logits = logits.to(dtype)
    likelihood = kfoc.Categorical()
    tolerance, least = (1e-5, 1e-37) if dtype == torch.float32 else (1e-12, 0)
    size = float(1 - sum(x * x for x in p))
    residuals = [[float((c == k) - p[k]) for k in range(4)] for c in range(4)]
    for cotangent in repeated(likelihood, logits, 20)[:, 0, 0].double():
        c = int(label(cotangent))
        expected = torch.tensor(residuals[c]).double()
        expected *= size**0.5 / expected.norm() * cotangent[c].sign()
        torch.testing.assert_close(cotangent, expected, rtol=tolerance, atol=least)
    exact = torch.stack(list(likelihood.exact(logits, None)))[:, 0].double()
    weights = torch.tensor([float(x) for x in p]).sqrt()[:, None]
    torch.testing.assert_close(exact, torch.tensor(residuals) * weights, rtol=tolerance, atol=least)
    for fisher in ("mc-plain", "empirical"):
        (found,) = likelihood.cotangents(logits, torch.tensor([0]), fisher, 1, 0, 0)
        expected = torch.tensor(residuals[0 if fisher == "empirical" else int(label(found[0]))])
        torch.testing.assert_close(found[0].double(), expected, rtol=tolerance, atol=least)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("exponent", [1, 6, 7, 8, 9, 12, 18, 30])
def test_sure_models_draw_the_sure_label_as_rarely_as_they_have_to(
    exponent: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first class is drawn below q_0, which is some (1 - p_0)^2, and not above."""
    p, logits = one_sure(Fraction(1, 10**exponent))
    norms = [(1 - x) ** 2 + sum(y * y for y in p) - x * x for x in p]
    q = float(p[0] * norms[0] / sum(x * norm for x, norm in zip(p, norms, strict=True)))
    near = 1e-4 if dtype == torch.float32 else 1e-9
    for point, below in ((q * (1 - near), True), (q * (1 + near), False)):
        monkeypatch.setattr(Draws, "spread", lambda *_, point=point: torch.tensor([[point]]))
        found = kfoc.Categorical().weighted(logits.to(dtype), None, Draws(0, 0)).double()
        others = found[0, 1:].sign().sum().abs() == 3  # all of one sign: the first is drawn
        assert bool(others) == below


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sure_bernoullis_keep_their_digits(dtype: torch.dtype) -> None:
    z = torch.tensor([[40.0, -40.0, 80.0, 0.0]], dtype=dtype)
    expected = (-z.double().abs()).exp() / (1 + (-z.double().abs()).exp()) ** 2  # p (1 - p)
    likelihood = kfoc.Bernoulli()
    for found in (drawn(likelihood, z)[0], torch.stack([*likelihood.exact(z, None)]).sum(0)):
        torch.testing.assert_close(found.double().square(), expected, rtol=1e-5, atol=0)
    (observed,) = likelihood.cotangents(z, torch.ones_like(z), "empirical", 1, 0, 0)
    torch.testing.assert_close(observed.double(), 1 / (1 + z.double().exp()), rtol=1e-5, atol=0)
    plain = drawn(likelihood, z, 1, "mc-plain")[0]  # the likely labels: 1 - p is e^-40
    assert 0 < plain[0, 0] < 1e-17


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("fisher", ["mc", "mc-plain", "exact"])
def test_one_hot_probabilities_give_zeros(fisher: str, dtype: torch.dtype) -> None:
    logits = torch.tensor([[0.0, 5000.0, 0.0], [5000.0, 0.0, 0.0], [0, 0, 5000.0]], dtype=dtype)
    for found in kfoc.Categorical().cotangents(logits, None, fisher, 3, 0, 0):
        assert torch.equal(found, torch.zeros_like(logits))
    model = nn.Linear(3, 3, bias=False, dtype=dtype)
    with torch.no_grad():
        model.weight.copy_(5000 * torch.eye(3))
    fitted = kfoc.fit(model, [(torch.eye(3, dtype=dtype), None)], fisher=fisher)
    assert not fitted[""].to_dense().any()


@pytest.mark.parametrize("fisher", ["mc", "mc-plain"])
def test_a_class_that_cannot_be_is_never_drawn(fisher: str) -> None:
    logits = torch.tensor([[-5000.0, 0.1, -5000.0, 0.4, -5000.0]]).repeat(300, 1)
    found = drawn(kfoc.Categorical(), logits, 3, fisher)
    assert found.isfinite().all()
    assert not found[..., ::2].any()
    assert found[..., 1].all()


def test_no_point_of_the_systematic_sampling_is_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    """At zero, a search finds the first class though it has no probability."""
    monkeypatch.setattr(
        Draws, "uniform", lambda self, n, places, device: torch.tensor([[0.5], [1.0], [2.0**-54]])
    )
    points = torch.cat([Draws(0, 0, k, 4).spread(3, 1, torch.device("cpu")) for k in range(4)], 1)
    assert points.min() > 0
    assert points.max() == 1
    found = kfoc.Categorical().weighted(
        torch.tensor([[-5000.0, 1.0, 0.0]]).repeat(3, 1), None, Draws(0, 0)
    )
    assert (found[:, 0] == 0).all()
    assert found.isfinite().all()


@pytest.mark.parametrize("count", [1, 2, 7, 40])
def test_systematic_sampling_draws_every_class_its_share(count: int) -> None:
    logits = torch.randn(30, 2, 6)
    flat = drawn(kfoc.Categorical(class_dim=-1), logits, count)
    p = logits.softmax(-1)
    wanted = p * ((1 - p) ** 2 + p.square().sum(-1, keepdim=True) - p**2)
    wanted = count * wanted / wanted.sum(-1, keepdim=True)
    times = nn.functional.one_hot(label(flat), 6).sum(0)
    assert ((times - wanted).abs() < 1).all()


def test_draws_do_not_depend_on_the_batches() -> None:
    likelihood, logits = kfoc.Categorical(class_dim=-1), torch.randn(10, 3, 5)
    whole = torch.stack([*likelihood.cotangents(logits, None, "mc", 3, 7, 20)])
    torch.manual_seed(5)
    parts = [
        torch.stack([*likelihood.cotangents(part, None, "mc", 3, 7, 20 + first)])
        for first, part in ((0, logits[:4]), (4, logits[4:5]), (5, logits[5:]))
    ]
    assert torch.equal(whole, torch.cat(parts, 1))
    other = torch.stack([*likelihood.cotangents(logits, None, "mc", 3, 8, 20)])
    assert not torch.equal(whole, other)


@pytest.mark.parametrize("total", [1, 4])
def test_signs_are_fair_and_independent_of_what_is_drawn(total: int) -> None:
    device = torch.device("cpu")
    draws = [Draws(0, 0, k, total) for k in range(total)]
    numbers = [each.signs(40_000, 2, device) for each in draws]
    assert all(torch.equal(each.abs(), torch.ones_like(each)) for each in numbers)
    numbers += [each.spread(40_000, 2, device) for each in draws[:1]]
    found = torch.corrcoef(torch.cat(numbers, 1).mT) - torch.eye(2 * total + 2)
    assert found.abs().max() < 5 / 40_000**0.5
    assert torch.cat(numbers[:-1]).mean().abs() < 5 / (80_000 * total) ** 0.5
    for k, each in enumerate(draws):  # the points of all directions: (0, 1], a step apart
        torch.testing.assert_close(each.spread(40_000, 2, device), numbers[-1] + k / total)
    assert numbers[-1].max() <= 1 / total
    assert (numbers[-1].mean() - 0.5 / total).abs() < 5 / total / 12**0.5 / 80_000**0.5


def test_ignored_labels_stay_without_influence() -> None:
    logits, labels = torch.randn(4, 3, 5), torch.randint(5, (4, 3))
    labels[1, 2] = labels[3, 0] = -100
    for found in kfoc.Categorical().cotangents(logits, labels, "mc", 2, 0, 0):
        assert torch.equal(found.any(-1), labels != -100)


# --- Likelihoods of one's own -------------------------------------------------------------------


class Fixed(kfoc.Gaussian):
    """Draws of its own, and a weighted one inherited that does not know of them."""

    def drawn(self, outputs: Tensor, targets: object, draws: Draws) -> Tensor:
        return torch.full_like(outputs, 7.0)


class Both(Fixed):
    def weighted(self, outputs: Tensor, targets: object, draws: Draws) -> Tensor:
        return torch.full_like(outputs, 8.0 + draws.direction / draws.total)


class Alone(kfoc.Likelihood):
    def check(self, outputs: Tensor, targets: object, fisher: str) -> None: ...

    def drawn(self, outputs: Tensor, targets: object, draws: Draws) -> Tensor:
        return torch.full_like(outputs, 7.0)

    exact = observed = None


@pytest.mark.parametrize("likelihood", [Fixed(), Alone(), type("Further", (Fixed,), {})()])
def test_own_draws_serve_both(likelihood: kfoc.Likelihood) -> None:
    for fisher in ("mc", "mc-plain"):
        assert (drawn(likelihood, torch.zeros(2, 1), 1, fisher) == 7).all()
    if isinstance(likelihood, Alone):
        assert (likelihood.weighted(torch.zeros(2, 1), None, Draws(0, 0)) == 7).all()


def test_own_weighted_draws_are_used() -> None:
    assert (drawn(Both(), torch.zeros(2, 1), 1, "mc-plain") == 7).all()
    torch.testing.assert_close(drawn(Both(), torch.zeros(1), 2)[:, 0], torch.tensor([8.0, 8.5]))


# --- What they are for --------------------------------------------------------------------------


@pytest.fixture(params=[40, 300])
def network(request: pytest.FixtureRequest) -> tuple[nn.Module, Tensor, dict[str, Tensor]]:
    """A classifier whose labels are nearly sure, its samples and their exact Fisher by layer."""
    torch.manual_seed(1)
    model, x, _ = trained(request.param)
    directions = oracle.categorical_exact(model(x).detach())
    return model, x, {k: oracle.fisher_block(model, k, x, directions) for k in ("0", "2", "4")}


def squared_errors(network, estimator: kfoc.Estimator, fisher: str, draws: int = 6) -> float:
    """Against the exact Fisher of the same data, mean over layers and draws."""
    model, x, exact = network
    found = []
    for seed in range(draws):
        fitted = kfoc.fit(model, [(x, None)], fisher=fisher, estimator=estimator, seed=seed)
        found += [oracle.relative_error(f, fitted[k].to_dense()) ** 2 for k, f in exact.items()]
    return sum(found) / len(found)


def test_variance_on_a_trained_network(network) -> None:
    """A fifth of the plain draw's, and of 300 samples a hundredth."""
    plain = squared_errors(network, kfoc.BlockDiagonal(), "mc-plain")
    weighted = squared_errors(network, kfoc.BlockDiagonal(), "mc")
    assert weighted < plain / (100 if len(network[1]) == 300 else 5)


def test_kfoc_of_a_weighted_draw_is_nearly_that_of_the_exact_fisher(network) -> None:
    """What it loses to the draw is a tenth of what it loses to the plain draw."""
    model, _, exact = network
    shapes = {k: (len(model[int(k)].weight), model[int(k)].in_features + 1) for k in exact}
    best = sum(oracle.optimum(exact[k], *shapes[k])[2] ** 2 for k in exact) / len(exact)
    plain = squared_errors(network, kfoc.KFOC(), "mc-plain") - best
    weighted = squared_errors(network, kfoc.KFOC(), "mc") - best
    assert -1e-9 < weighted < plain / 10


@pytest.mark.parametrize("shape", [(7, 4), (3, 5, 4), (3, 4, 5)])
def test_some_logits_at_a_time_are_all(
    monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...]
) -> None:
    outputs = torch.randn(shape)
    likelihood = kfoc.Categorical(class_dim=1 if shape[-1] == 5 else -1)
    found = []
    for numbers in (softmax.CHUNK, 9):
        monkeypatch.setattr(softmax, "CHUNK", numbers)
        found.append(likelihood.weighted(outputs, None, Draws(3, 11)))
    torch.testing.assert_close(*found, rtol=1e-14, atol=0)
    assert found[0].shape == outputs.shape
