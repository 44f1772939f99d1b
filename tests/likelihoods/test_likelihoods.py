"""Cotangents against autograd of torch's own losses, and the statistics of the draws."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.nn import functional

import kfoc
import oracle
from kfoc.likelihoods.draws import Draws, _bits, _mix


def directions(
    likelihood: kfoc.Likelihood, outputs: Tensor, targets: object, fisher: str, mc: int = 1
) -> Tensor:
    return torch.stack(list(likelihood.cotangents(outputs, targets, fisher, mc, 0, 0)))


def covariance(cotangents: Tensor) -> Tensor:
    """sum_s g g^T per sample, (N, P, P)."""
    flat = cotangents.flatten(2)
    return torch.einsum("snp,snq->npq", flat, flat)


OUTPUTS = {
    "categorical": (torch.Size([4, 3]), 1),
    "gaussian": (torch.Size([4, 2, 3]), None),
    "bernoulli": (torch.Size([4, 5]), None),
}


def hessian(loss, outputs: Tensor) -> Tensor:
    """Per-sample Hessian of a summed loss that is separable over samples, (N, P, P)."""
    full = torch.autograd.functional.hessian(loss, outputs)
    count, size = len(outputs), outputs[0].numel()
    blocks = full.reshape(count, size, count, size)
    return torch.stack([blocks[n, :, n] for n in range(count)])


@pytest.mark.parametrize("name", OUTPUTS)
def test_exact_fisher_is_the_hessian_of_the_loss(name: str) -> None:
    # For these likelihoods in their natural parameters the two are the same matrix.
    outputs = torch.randn(OUTPUTS[name][0])
    losses = {
        "categorical": lambda z: functional.cross_entropy(
            z, torch.zeros(4).long(), reduction="sum"
        ),
        "gaussian": lambda z: 0.5 * z.square().sum(),
        "bernoulli": lambda z: functional.binary_cross_entropy_with_logits(
            z, torch.ones_like(z), reduction="sum"
        ),
    }
    likelihood = {
        "categorical": kfoc.Categorical(),
        "gaussian": kfoc.Gaussian(),
        "bernoulli": kfoc.Bernoulli(),
    }[name]
    found = covariance(directions(likelihood, outputs, None, "exact"))
    torch.testing.assert_close(found, hessian(losses[name], outputs))


@pytest.mark.parametrize("name", OUTPUTS)
def test_plain_draws_have_the_exact_covariance_and_mean_zero(name: str) -> None:
    outputs = torch.randn(OUTPUTS[name][0])
    likelihood = {
        "categorical": kfoc.Categorical(),
        "gaussian": kfoc.Gaussian(),
        "bernoulli": kfoc.Bernoulli(),
    }[name]
    count = 3_000
    drawn = directions(likelihood, outputs, None, "mc-plain", count)
    exact = covariance(directions(likelihood, outputs, None, "exact"))
    flat = drawn.flatten(2) * count**0.5
    products = torch.einsum("snp,snq->snpq", flat, flat)
    deviation = products.std(0) / count**0.5
    assert ((products.mean(0) - exact).abs() <= 5 * deviation + 1e-12).all()
    assert (flat.mean(0).abs() <= 5 * flat.std(0) / count**0.5).all()


def test_observed_labels_are_the_gradient_of_the_log_likelihood() -> None:
    logits, labels = torch.randn(6, 4), torch.randint(4, (6,))
    found = directions(kfoc.Categorical(), logits, labels, "empirical")
    torch.testing.assert_close(found, oracle.categorical_observed(logits, labels))
    z, y = torch.randn(6, 2), torch.rand(6, 2).round()
    leaf = z.clone().requires_grad_()
    loss = functional.binary_cross_entropy_with_logits(leaf, y, reduction="sum")
    torch.testing.assert_close(
        directions(kfoc.Bernoulli(), z, y, "empirical")[0], -torch.autograd.grad(loss, leaf)[0]
    )
    torch.testing.assert_close(directions(kfoc.Gaussian(), z, y, "empirical")[0], y - z)


@pytest.mark.parametrize("shape", [(3, 4, 5), (3, 5, 4, 2)], ids=["sequence", "image"])
def test_class_dimension_and_ignored_labels(shape: tuple[int, ...]) -> None:
    logits = torch.randn(shape)
    class_last = len(shape) == 3
    labels = torch.randint(5, shape[:-1] if class_last else (shape[0], *shape[2:]))
    labels[0, 0] = -100
    leaf = logits.clone().requires_grad_()
    moved = leaf.movedim(-1, 1) if class_last else leaf
    loss = functional.cross_entropy(moved, labels, reduction="sum")
    expected = -torch.autograd.grad(loss, leaf)[0]
    found = directions(kfoc.Categorical(), logits, labels, "empirical")
    torch.testing.assert_close(found[0], expected)
    exact = covariance(directions(kfoc.Categorical(), logits, labels, "exact"))
    losses = hessian(
        lambda z: functional.cross_entropy(
            z.movedim(-1, 1) if class_last else z, labels, reduction="sum"
        ),
        logits,
    )
    torch.testing.assert_close(exact, losses)
    drawn = directions(kfoc.Categorical(), logits, labels, "mc", 3)
    assert torch.equal(drawn == 0, (expected == 0).expand_as(drawn))


def test_dim_one_for_three_dimensions_follows_the_labels() -> None:
    logits, labels = torch.randn(3, 5, 4), torch.randint(5, (3, 4))
    found = directions(kfoc.Categorical(), logits, labels, "empirical")
    assert found[0].sum(1).abs().max() < 1e-12
    ambiguous = torch.randn(3, 4, 4), torch.randint(4, (3, 4))
    with pytest.raises(ValueError, match=r"say which by .*class_dim"):
        directions(kfoc.Categorical(), *ambiguous, "empirical")
    assert (
        directions(kfoc.Categorical(class_dim=-1), *ambiguous, "empirical")[0].sum(-1).abs().max()
        < 1e-12
    )


def test_draws_depend_on_seed_and_index_alone() -> None:
    device = torch.device("cpu")
    whole = Draws(3, 0).uniform(10, 4, device)
    torch.manual_seed(77)
    parts = [Draws(3, 0).uniform(6, 4, device), Draws(3, 6).uniform(4, 4, device)]
    assert torch.equal(whole, torch.cat(parts))
    assert not torch.equal(whole, Draws(4, 0).uniform(10, 4, device))
    assert not torch.equal(whole, Draws(3, 0, 1).uniform(10, 4, device))


def test_draws_are_uniform_and_uncorrelated() -> None:
    draws = Draws(0, 0).uniform(50_000, 4, torch.device("cpu"))
    assert draws.min() > 0
    assert draws.max() < 1
    counts = torch.histc(draws, 100, 0, 1)
    chi_squared = ((counts - 2000) ** 2 / 2000).sum().item()
    assert chi_squared < 165  # the 99.997 % point of 99 degrees of freedom
    lagged = torch.cat([draws[1:], draws[:-1]], 1)
    correlations = torch.corrcoef(lagged.mT) - torch.eye(8)
    assert correlations.abs().max() < 5 / 50_000**0.5


@pytest.mark.parametrize(
    ("likelihood", "outputs", "targets", "fisher", "match"),
    [
        ("categorical", torch.zeros(3), torch.zeros(3).long(), "mc", "must be logits of shape"),
        (
            "categorical",
            torch.zeros(3, 2),
            torch.tensor([0, 1, 2]),
            "mc",
            "label 2 is out of range for 2 classes",
        ),
        (
            "categorical",
            torch.zeros(3, 2),
            torch.tensor([0, -1, 1]),
            "empirical",
            "label -1 is out of range",
        ),
        (
            "categorical",
            torch.zeros(3, 2),
            torch.zeros(4).long(),
            "exact",
            "do not fit categorical outputs",
        ),
        (
            "categorical",
            torch.zeros(3, 2),
            torch.zeros(3),
            "empirical",
            "needs integer class labels",
        ),
        ("categorical", torch.zeros(3, 2), None, "empirical", "found NoneType"),
        (
            "gaussian",
            torch.zeros(3, 1),
            torch.zeros(3),
            "empirical",
            r"shape \(3, 1\) of the outputs",
        ),
        (
            "bernoulli",
            torch.zeros(3, 1),
            torch.full((3, 1), 2.0),
            "empirical",
            "label 2.0 is out of range",
        ),
    ],
)
def test_what_does_not_fit(
    likelihood: str, outputs: Tensor, targets: object, fisher: str, match: str
) -> None:
    made = {
        "categorical": kfoc.Categorical(),
        "gaussian": kfoc.Gaussian(),
        "bernoulli": kfoc.Bernoulli(),
    }
    with pytest.raises(ValueError, match=match):
        directions(made[likelihood], outputs, targets, fisher)


def test_draws_are_the_same_by_numpy_and_torch() -> None:
    """On a CPU they are made by the one, elsewhere by the other."""
    device = torch.device("cpu")
    for places in (1, 5):
        bits = _bits(torch.arange(3, 40), torch.arange(places), _mix(_mix(-7) + 2))
        found = Draws(-7, 3, 2).uniform(37, places, device)
        assert torch.equal(found, (bits.double() + 0.5) / 2**53)


@pytest.mark.parametrize("likelihood", ["gaussian", "bernoulli"])
def test_targets_that_are_not_finite(likelihood: str) -> None:
    model, x, y = torch.nn.Linear(3, 2), torch.randn(4, 3), torch.rand(4, 2)
    y[1, 0] = torch.nan
    with pytest.raises(ValueError, match="batch 1: the targets have values that are not finite"):
        kfoc.fit(model, [(x, y.clone().nan_to_num(0)), (x, y)], likelihood, fisher="empirical")


class Own(kfoc.Gaussian):
    """Another Fisher, of which what it inherits is no closed form."""

    def exact(self, outputs: Tensor, targets: object) -> Iterator[Tensor]:
        return (2 * each for each in super().exact(outputs, targets))


SHAPES: list[tuple[kfoc.Likelihood, tuple[int, ...]]] = [
    (kfoc.Categorical(), (4, 3)),
    (kfoc.Categorical(), (4, 2, 3)),
    (kfoc.Categorical(), (2, 3, 2, 2)),
    (kfoc.Gaussian(), (4, 2, 3)),
    (kfoc.Bernoulli(), (4, 5)),
    (Own(), (4, 2, 3)),
]


@pytest.mark.parametrize(("likelihood", "shape"), SHAPES)
def test_products_with_the_fisher_by_the_outputs(
    likelihood: kfoc.Likelihood, shape: tuple[int, ...]
) -> None:
    outputs, vectors = torch.randn(shape), torch.randn(3, *shape)
    matrices = covariance(directions(likelihood, outputs, None, "exact"))
    expected = torch.einsum("npq,knq->knp", matrices, vectors.flatten(2)).view(vectors.shape)
    torch.testing.assert_close(likelihood.fisher_product(outputs, None, vectors), expected)


def test_ignored_labels_have_no_part_in_products() -> None:
    outputs, vectors = torch.randn(2, 3, 4), torch.randn(2, 2, 3, 4)
    labels = torch.tensor([[1, 2, 3]] * 2)
    labels[0, 1] = -100
    found = kfoc.Categorical().fisher_product(outputs, labels, vectors)
    expected = kfoc.Categorical().fisher_product(outputs, None, vectors)
    expected[:, 0, 1] = 0
    torch.testing.assert_close(found, expected)


def test_products_of_sure_models_keep_their_digits() -> None:
    """p_1 (1 - p_1) of a sure class is 1e-9, of which 1 - p in float32 has nothing."""
    outputs = torch.tensor([[21.0, 0.0, 0.5]])
    vectors = torch.eye(3)[:, None]
    expected = kfoc.Categorical().fisher_product(outputs, None, vectors)
    p = outputs.softmax(-1)[0]
    torch.testing.assert_close(expected[:, 0], p.diag() - p[:, None] * p, rtol=1e-6, atol=0)
    found = kfoc.Categorical().fisher_product(outputs.float(), None, vectors.float())
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=0)
