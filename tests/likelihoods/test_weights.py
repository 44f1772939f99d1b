"""Weights, smoothing, soft labels and noise against derivatives of torch's own losses."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jacrev, vmap
from torch.nn import functional

import kfoc
from kfoc.likelihoods.draws import Draws
from kfoc.running.fingerprint import described

SHARES = torch.tensor([0.5, 3.0, 1.2], dtype=torch.float64)
EACH = torch.tensor([0.3, 2.0, 1.0, 0.0], dtype=torch.float64)


def soft(*shape: int, dim: int = -1) -> Tensor:
    return torch.randn(*shape).softmax(dim)


@dataclass(frozen=True)
class Case:
    """A likelihood, its outputs' shape, targets of four samples, and torch's loss of one batch."""

    likelihood: kfoc.Likelihood
    shape: tuple[int, ...]
    targets: Callable[[], Any]
    loss: Callable[[Tensor, Any], Tensor]
    labels: Callable[[Any], Tensor] = lambda targets: torch.ones(4)


def entropy(**options: Any) -> Callable[[Tensor, Any], Tensor]:
    return lambda z, y: functional.cross_entropy(z, y, reduction="sum", **options)


def last(loss: Callable[[Tensor, Any], Tensor]) -> Callable[[Tensor, Any], Tensor]:
    """Of outputs with their classes in the last of three dimensions."""
    return lambda z, y: loss(z.movedim(-1, 1), y.movedim(-1, 1) if y.ndim == 3 else y)


def tokens() -> Tensor:
    labels = torch.tensor([[0, 2], [1, 1], [2, 0], [1, 2]])
    labels[1, 0] = labels[3, 1] = -100
    return labels


def noisy(z: Tensor, y: Tensor) -> Tensor:
    mean, log_variance = z.chunk(2, 1)
    normal = torch.distributions.Normal(mean, (log_variance / 2).exp(), validate_args=False)
    return -normal.log_prob(y).sum()  # nn.GaussianNLLLoss looks at values, which vmap cannot


VARIANCES = torch.tensor([0.2, 1.0, 5.0], dtype=torch.float64)
ONE_IN = torch.tensor([0, 2, 1, 1])


def of_classes(labels: Tensor) -> Tensor:
    counts = (labels >= 0).to(SHARES)
    return (SHARES[labels.clamp_min(0)] * counts).reshape(4, -1).sum(1)


CASES = {
    "class weights": Case(
        kfoc.Categorical(weight=SHARES), (4, 3), lambda: ONE_IN, entropy(weight=SHARES), of_classes
    ),
    "smoothing": Case(
        kfoc.Categorical(label_smoothing=0.3), (4, 3), lambda: ONE_IN, entropy(label_smoothing=0.3)
    ),
    "weights and smoothing": Case(
        kfoc.Categorical(weight=SHARES, label_smoothing=0.3),
        (4, 3),
        lambda: ONE_IN,
        entropy(weight=SHARES, label_smoothing=0.3),
        lambda y: 0.7 * of_classes(y) + 0.1 * SHARES.sum(),
    ),
    "soft": Case(kfoc.Categorical(), (4, 3), lambda: soft(4, 3), entropy()),
    "soft, weights and smoothing": Case(
        kfoc.Categorical(weight=SHARES, label_smoothing=0.3),
        (4, 3),
        lambda: soft(4, 3),
        entropy(weight=SHARES, label_smoothing=0.3),
        lambda t: (0.7 * t + 0.1) @ SHARES,
    ),
    "sequence": Case(
        kfoc.Categorical(weight=SHARES, label_smoothing=0.2),
        (4, 2, 3),
        tokens,
        last(entropy(weight=SHARES, label_smoothing=0.2)),
        lambda y: 0.8 * of_classes(y) + 0.2 / 3 * SHARES.sum() * (y >= 0).sum(1),
    ),
    "soft sequence": Case(
        kfoc.Categorical(weight=SHARES),
        (4, 2, 3),
        lambda: soft(4, 2, 3),
        last(entropy(weight=SHARES)),
        lambda t: (t @ SHARES).sum(1),
    ),
    "soft image": Case(
        kfoc.Categorical(weight=SHARES),
        (4, 3, 2, 1),
        lambda: soft(4, 3, 2, 1, dim=1),
        entropy(weight=SHARES),
        lambda t: (t.movedim(1, -1) @ SHARES).reshape(4, -1).sum(1),
    ),
    "pos_weight": Case(
        kfoc.Bernoulli(pos_weight=SHARES),
        (4, 3),
        lambda: torch.rand(4, 3),
        lambda z, y: functional.binary_cross_entropy_with_logits(
            z, y, pos_weight=SHARES, reduction="sum"
        ),
        lambda y: (y * SHARES + 1 - y).sum(1),
    ),
    "one pos_weight": Case(
        kfoc.Bernoulli(pos_weight=4.0),
        (4, 2, 2),
        lambda: torch.rand(4, 2, 2).round(),
        lambda z, y: functional.binary_cross_entropy_with_logits(
            z, y, pos_weight=torch.tensor(4.0), reduction="sum"
        ),
        lambda y: (1 + 3 * y).sum((1, 2)),
    ),
    "noise per output": Case(
        kfoc.Gaussian(var=VARIANCES),
        (4, 2, 3),
        lambda: torch.randn(4, 2, 3),
        lambda z, y: nn.GaussianNLLLoss(full=True, reduction="sum")(z, y, VARIANCES.expand_as(z)),
        lambda y: torch.full((4,), 6.0),
    ),
    "heteroscedastic": Case(
        kfoc.HeteroscedasticGaussian(),
        (4, 6),
        lambda: torch.randn(4, 3),
        noisy,
        lambda y: torch.full((4,), 3.0),
    ),
    "heteroscedastic image": Case(
        kfoc.HeteroscedasticGaussian(dim=1),
        (4, 2, 2, 2),
        lambda: torch.randn(4, 1, 2, 2),
        noisy,
        lambda y: torch.full((4,), 4.0),
    ),
    "sample weights": Case(
        kfoc.SampleWeighted("categorical"),
        (4, 3),
        lambda: (ONE_IN, EACH),
        lambda z, t: (functional.cross_entropy(z, t[0], reduction="none") * t[1]).sum(),
        lambda t: EACH,
    ),
    "weighted sequences": Case(
        kfoc.SampleWeighted("categorical"),
        (4, 2, 3),
        lambda: (tokens(), EACH),
        lambda z, t: (
            functional.cross_entropy(z.movedim(-1, 1), t[0], reduction="none").sum(1) * t[1]
        ).sum(),
        lambda t: EACH * (t[0] >= 0).sum(1),
    ),
    "sample and class weights": Case(
        kfoc.SampleWeighted(kfoc.Categorical(weight=SHARES)),
        (4, 3),
        lambda: (ONE_IN, EACH),
        lambda z, t: (
            functional.cross_entropy(z, t[0], weight=SHARES, reduction="none") * t[1]
        ).sum(),
        lambda t: EACH * SHARES[ONE_IN],
    ),
    "weighted regression": Case(
        kfoc.SampleWeighted("gaussian"),
        (4, 2),
        lambda: (torch.randn(4, 2), EACH),
        lambda z, t: -(torch.distributions.Normal(z, 1.0).log_prob(t[0]) * t[1][:, None]).sum(),
        lambda t: 2 * EACH,
    ),
}


def sliced(targets: Any, part: slice) -> Any:
    return tuple(t[part] for t in targets) if isinstance(targets, tuple) else targets[part]


def repeated(values: Any, count: int) -> Any:
    if isinstance(values, tuple):
        return tuple(repeated(value, count) for value in values)
    return values.repeat(count, *[1] * (values.ndim - 1))


def alone(case: Case) -> Callable[[Tensor, Any], Tensor]:
    """The loss of one sample without its first dimension."""
    return lambda z, y: case.loss(
        z[None], tuple(t[None] for t in y) if isinstance(y, tuple) else y[None]
    )


def second_derivative(case: Case, outputs: Tensor, targets: Any) -> Tensor:
    """Of the loss, (N, P, P); for a heteroscedastic Gaussian its expectation over targets.

    That Hessian is quadratic in each target: its mean at m - sigma and m + sigma is it.
    """
    if isinstance(case.likelihood, kfoc.HeteroscedasticGaussian):
        mean, log_variance = outputs.chunk(2, 1)
        ends = [mean + sign * (log_variance / 2).exp() for sign in (-1, 1)]
    else:
        ends = [targets]
    size = outputs[0].numel()
    found = [vmap(jacrev(jacrev(alone(case))))(outputs, end) for end in ends]
    return torch.stack(found).mean(0).reshape(4, size, size)


@pytest.fixture(params=CASES)
def problem(request: pytest.FixtureRequest) -> tuple[Case, Tensor, Any]:
    torch.manual_seed(3)
    case = CASES[request.param]
    return case, torch.randn(case.shape), case.targets()


def directions(case: Case, z: Tensor, y: Any, fisher: str, mc: int = 1, index: int = 0) -> Tensor:
    settled = case.likelihood.settled(z, y)
    return torch.stack(list(settled.cotangents(z, y, fisher, mc, 0, index)))


def test_exact_is_the_second_derivative_of_the_loss(problem) -> None:
    flat = directions(*problem, "exact").flatten(2)
    found = torch.einsum("snp,snq->npq", flat, flat)
    torch.testing.assert_close(found, second_derivative(*problem))


def test_products_are_by_the_second_derivative_of_the_loss(problem) -> None:
    case, z, y = problem
    vectors = torch.randn(3, *z.shape, dtype=z.dtype)
    expected = torch.einsum("npq,knq->knp", second_derivative(case, z, y), vectors.flatten(2))
    found = case.likelihood.settled(z, y).fisher_product(z, y, vectors)
    torch.testing.assert_close(found.flatten(2), expected, rtol=1e-9, atol=1e-12)


def test_empirical_is_the_gradient_of_the_loss(problem) -> None:
    case, outputs, targets = problem
    expected = -vmap(grad(alone(case)))(outputs, targets)
    torch.testing.assert_close(directions(*problem, "empirical")[0], expected)


@pytest.mark.parametrize("fisher", ["mc", "mc-plain"])
def test_draws_have_the_mean_zero_and_the_covariance_of_exact(problem, fisher: str) -> None:
    case, outputs, targets = problem
    count = 4000  # of every sample, each at an index of its own
    (drawn,) = directions(case, repeated(outputs, count), repeated(targets, count), fisher)
    flat = drawn.unflatten(0, (count, 4)).flatten(2)
    products = torch.einsum("snp,snq->snpq", flat, flat)
    error = products.std(0) / count**0.5
    assert ((products.mean(0) - second_derivative(*problem)).abs() <= 5 * error + 1e-12).all()
    assert (flat.mean(0).abs() <= 5 * flat.std(0) / count**0.5 + 1e-12).all()


@pytest.mark.parametrize("fisher", ["mc", "mc-plain"])
def test_draws_do_not_depend_on_the_batches(problem, fisher: str) -> None:
    case, outputs, targets = problem
    whole = directions(*problem, fisher, 2, 5)
    parts = [
        directions(case, outputs[part], sliced(targets, part), fisher, 2, 5 + part.start)
        for part in (slice(0, 1), slice(1, 4))
    ]
    torch.testing.assert_close(whole, torch.cat(parts, 1), rtol=1e-13, atol=0)


def test_log_likelihood_is_minus_the_loss(problem) -> None:
    case, outputs, targets = problem
    likelihood = case.likelihood.settled(outputs, targets)
    expected = vmap(alone(case))(outputs, targets)
    torch.testing.assert_close(likelihood.log_likelihood(outputs, targets), -expected)
    torch.testing.assert_close(likelihood.num_labels(outputs, targets), case.labels(targets))


def test_the_loss_of_a_heteroscedastic_gaussian_is_that_of_torch() -> None:
    z, y = torch.randn(4, 6), torch.randn(4, 3)
    loss = nn.GaussianNLLLoss(full=True, reduction="sum")
    expected = loss(z[:, :3], y, z[:, 3:].exp())
    torch.testing.assert_close(noisy(z, y), expected)
    found = kfoc.HeteroscedasticGaussian().log_likelihood(z, y)
    torch.testing.assert_close(-found.sum(), expected)


@pytest.mark.parametrize("fisher", ["exact", "empirical"])
def test_the_blocks_of_a_fit(problem, fisher: str) -> None:
    """Of a model's parameters, by torch.func: Jacobians with the Hessian, or gradients."""
    case, outputs, targets = problem
    size = outputs[0].numel()
    model = nn.Sequential(nn.Linear(3, size), nn.Unflatten(1, case.shape[1:]))
    x, weights = torch.randn(4, 3), dict(model.named_parameters())

    def run(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(model, parameters, (x[None],))[0]

    if fisher == "exact":
        jacobian = vmap(jacrev(run), (None, 0))(weights, x)
        z = model(x).detach()
        middle = second_derivative(case, z, targets)
        rows = joined({k: v.flatten(1, len(case.shape) - 1) for k, v in jacobian.items()})
        expected = torch.einsum("nkp,nkl,nlq->pq", rows, middle, rows) / 4
    else:
        of_one = vmap(grad(lambda p, x, y: alone(case)(run(p, x), y)), (None, 0, 0))
        rows = joined(of_one(weights, x, targets))
        expected = rows.mT @ rows / 4
    found = kfoc.fit(
        model, [(x, targets)], case.likelihood, estimator=kfoc.BlockDiagonal(), fisher=fisher
    )
    torch.testing.assert_close(found["0"].to_dense(), expected)


def joined(gradients: dict[str, Tensor]) -> Tensor:
    """Rows (..., o * (i + 1)) of the matrices [W | b]."""
    weight, bias = gradients["0.weight"], gradients["0.bias"]
    weight = weight.reshape(*bias.shape, 3)
    return torch.cat([weight, bias[..., None]], -1).flatten(-2)


def test_a_weight_of_two_is_the_sample_twice() -> None:
    model, x, y = nn.Linear(3, 2), torch.randn(5, 3), torch.tensor([0, 1, 1, 0, 1])
    weights = torch.tensor([1.0, 2.0, 0.0, 1.0, 3.0])
    index = torch.arange(5).repeat_interleave(weights.int())
    twice = kfoc.fit(model, [(x[index], y[index])], fisher="exact", estimator=kfoc.BlockDiagonal())
    found = kfoc.fit(
        model,
        [(x, (None, weights))],
        kfoc.SampleWeighted(),
        fisher="exact",
        estimator=kfoc.BlockDiagonal(),
    )
    torch.testing.assert_close(5 * found[""].to_dense(), 7 * twice[""].to_dense())


def test_options_keep_their_digits_under_another_default_dtype() -> None:
    z, y = torch.randn(4, 2), torch.rand(4, 2)
    torch.set_default_dtype(torch.float32)
    found = directions(Case(kfoc.Gaussian(var=0.1), (), None, None), z, y, "empirical")
    torch.testing.assert_close(found[0], (y - z) / 0.1, rtol=1e-14, atol=0)
    binary = Case(kfoc.Bernoulli(pos_weight=0.1), (), None, None)
    expected = 0.1 * y * (-z).sigmoid() - (1 - y) * z.sigmoid()
    torch.testing.assert_close(
        directions(binary, z, y, "empirical")[0], expected, rtol=1e-13, atol=0
    )
    noisy = kfoc.OutputGaussian(z, torch.zeros(4, 2, 2, dtype=z.dtype)).with_noise(0.1)
    torch.testing.assert_close(noisy.variance, torch.full_like(z, 0.01), rtol=1e-14, atol=0)


def test_a_fit_knows_the_weights_of_another() -> None:
    """What checkpoints and ranks compare."""
    names = [
        described(likelihood)
        for likelihood in (
            kfoc.Categorical(weight=SHARES),
            kfoc.Categorical(weight=SHARES + 1),
            kfoc.Categorical(),
            kfoc.SampleWeighted(kfoc.Categorical(weight=SHARES)),
            kfoc.SampleWeighted(kfoc.Categorical(weight=SHARES + 1)),
            kfoc.Gaussian(var=2.0),
            kfoc.Gaussian(),
        )
    ]
    assert len(set(names)) == len(names)
    assert described(kfoc.Categorical(weight=SHARES.clone())) == names[0]


def test_trackers_take_weighted_samples() -> None:
    model, x, pair = nn.Linear(3, 2), torch.randn(6, 3), (torch.zeros(6).long(), torch.rand(6))
    how = {"fisher": "exact", "estimator": kfoc.Diagonal()}
    tracker = kfoc.Tracker(model, kfoc.SampleWeighted(), decay=1.0, **how)
    tracker.update(x[:4], sliced(pair, slice(0, 4)))
    tracker.update(x[4:], sliced(pair, slice(4, 6)))
    data = [{"input": x, "labels": pair}]
    fitted = kfoc.fit(model, data, kfoc.SampleWeighted(), **how)
    torch.testing.assert_close(tracker.curvature()[""].to_dense(), fitted[""].to_dense())


def test_weights_are_copied() -> None:
    weight = torch.ones(3)
    likelihood = kfoc.Categorical(weight=weight)
    weight[0] = 7.0
    assert torch.equal(likelihood.weight, torch.ones(3))


def test_soft_labels_settle_where_the_classes_are() -> None:
    """Without labels it is the last of three dimensions; torch's losses take the second."""
    logits, labels = torch.randn(3, 5, 4), soft(3, 5, 4, dim=1)
    for fisher in ("mc", "exact", "empirical"):
        (found, *_) = kfoc.Categorical().cotangents(logits, labels, fisher, 1, 0, 0)
        torch.testing.assert_close(found.sum(1), torch.zeros(3, 4))
    assert kfoc.Categorical().settled(logits, labels).class_dim == 1
    square = torch.eye(3)[torch.stack([torch.randperm(3) for _ in range(2)])]
    with pytest.raises(ValueError, match="in dimension 1 or in the last one"):
        kfoc.Categorical().settled(torch.randn(2, 3, 3), square)


def test_real_numbers_that_are_no_labels_do_no_harm_where_none_are_needed() -> None:
    logits = torch.randn(4, 3)
    found = directions(Case(kfoc.Categorical(), (4, 3), None, None), logits, logits, "mc")
    assert torch.equal(
        found, directions(Case(kfoc.Categorical(), (), None, None), logits, None, "mc")
    )


class Own(kfoc.Gaussian):
    """Draws of its own, that weighted samples have too."""

    def drawn(self, outputs: Tensor, targets: object, draws: Draws) -> Tensor:
        return torch.full_like(outputs, 7.0)

    def exact(self, outputs: Tensor, targets: object) -> Iterator[Tensor]:
        yield torch.full_like(outputs, 3.0)


def test_weights_for_a_likelihood_of_ones_own() -> None:
    targets = torch.zeros(4, 1), EACH
    for fisher, value in (("mc", 7.0), ("mc-plain", 7.0), ("exact", 3.0)):
        (found,) = kfoc.SampleWeighted(Own()).cotangents(
            torch.zeros(4, 1), targets, fisher, 1, 0, 0
        )
        torch.testing.assert_close(found[:, 0], value * EACH.sqrt())


BAD: dict[str, tuple[Callable[[], kfoc.Likelihood], str]] = {
    "weight by name": (lambda: kfoc.Categorical(weight="balanced"), "weight .* must be numbers"),
    "weight's shape": (lambda: kfoc.Categorical(weight=torch.ones(2, 2)), r"the shape \(C,\)"),
    "negative weight": (lambda: kfoc.Categorical(weight=[1.0, -1.0]), "finite and not negative"),
    "weight of NaN": (lambda: kfoc.Categorical(weight=[1.0, math.nan]), "finite and not negative"),
    "smoothing": (lambda: kfoc.Categorical(label_smoothing=1.1), "a number from 0 to 1"),
    "pos_weight": (lambda: kfoc.Bernoulli(pos_weight=-1.0), "finite and not negative"),
    "variance": (lambda: kfoc.Gaussian(var=0.0), "var of Gaussian must be finite and positive"),
    "inner": (lambda: kfoc.SampleWeighted("poisson"), "likelihood must be one of"),
}


@pytest.mark.parametrize("case", BAD)
def test_options_that_make_no_sense(case: str) -> None:
    make, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        make()


LOSSES = {
    "kfoc.Categorical(weight=..., label_smoothing=...)": nn.CrossEntropyLoss(
        weight=SHARES, label_smoothing=0.1
    ),
    "kfoc.Bernoulli(pos_weight=...)": nn.BCEWithLogitsLoss(pos_weight=SHARES),
    "kfoc.Gaussian(var=...) or kfoc.HeteroscedasticGaussian()": nn.GaussianNLLLoss(),
    'likelihood="categorical" (its': nn.CrossEntropyLoss(),
}


@pytest.mark.parametrize("hint", LOSSES)
def test_what_to_write_for_a_loss(hint: str) -> None:
    """Its options are in the hint, or whoever follows that would lose them."""
    with pytest.raises(ValueError, match=re.escape(hint)):
        kfoc.fit(nn.Linear(3, 3), [], LOSSES[hint])


WEIGHTED = kfoc.Categorical(weight=SHARES)
REFUSED: dict[str, tuple[kfoc.Likelihood, Tensor, Any, str, str]] = {
    "no labels for weights": (WEIGHTED, torch.zeros(4, 3), None, "mc", "a weight of the classes"),
    "classes": (WEIGHTED, torch.zeros(4, 2), ONE_IN % 2, "mc", "has 3 numbers, for outputs of 2"),
    "negative labels": (
        kfoc.Categorical(),
        torch.zeros(1, 2),
        torch.tensor([[2.0, -1.0]]),
        "empirical",
        "finite, not negative, and add up to one over dimension 1",
    ),
    "many labels": (
        kfoc.Categorical(),
        torch.zeros(1, 2),
        torch.ones(1, 2),
        "empirical",
        "add up to one",
    ),
    "pos_weight without labels": (
        kfoc.Bernoulli(pos_weight=2.0),
        torch.zeros(4, 3),
        None,
        "exact",
        "pos_weight with a bernoulli likelihood needs targets of the shape",
    ),
    "pos_weight by sample": (
        kfoc.Bernoulli(pos_weight=torch.ones(4, 3)),
        torch.zeros(4, 3),
        torch.ones(4, 3),
        "exact",
        r"the shape \(4, 3\), which does not broadcast",
    ),
    "variance": (
        kfoc.Gaussian(var=torch.ones(2)),
        torch.zeros(4, 3),
        None,
        "mc",
        r"var of Gaussian has the shape \(2,\), which does not broadcast",
    ),
    "odd": (
        kfoc.HeteroscedasticGaussian(),
        torch.zeros(4, 3),
        None,
        "mc",
        "an even size in dimension 1",
    ),
    "which dimension": (
        kfoc.HeteroscedasticGaussian(),
        torch.zeros(4, 2, 2),
        None,
        "mc",
        "told by dim=",
    ),
    "of the samples": (
        kfoc.HeteroscedasticGaussian(dim=0),
        torch.zeros(4, 2),
        None,
        "mc",
        "the first is that of the samples",
    ),
    "means": (
        kfoc.HeteroscedasticGaussian(),
        torch.zeros(4, 2),
        torch.zeros(4),
        "empirical",
        r"targets of the shape \(4, 1\) of the means",
    ),
    "no pair": (kfoc.SampleWeighted(), torch.zeros(4, 3), ONE_IN, "mc", "must be pairs"),
    "weights' shape": (
        kfoc.SampleWeighted(),
        torch.zeros(4, 3),
        (ONE_IN, torch.ones(4, 1)),
        "mc",
        r"a tensor of shape \(4,\), one for each sample",
    ),
    "negative weights": (
        kfoc.SampleWeighted(),
        torch.zeros(4, 3),
        (ONE_IN, -EACH),
        "mc",
        "finite and not negative",
    ),
    "labels in a pair": (
        kfoc.SampleWeighted(),
        torch.zeros(4, 3),
        (ONE_IN + 1, EACH),
        "mc",
        "label 3 is out of range",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_told(case: str) -> None:
    likelihood, outputs, targets, fisher, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        list(likelihood.settled(outputs, targets).cotangents(outputs, targets, fisher, 1, 0, 0))
