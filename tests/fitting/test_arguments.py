"""Arguments as people get them wrong, at every function that takes them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import kfoc
import oracle
from models import FEW_PASSES

Call = Callable[[Any], Any]


def data() -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(6, 4), torch.randint(3, (6,))


def linear() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 3))


def curvature(model: nn.Module | None = None) -> kfoc.Curvature:
    return kfoc.fit(model or linear(), [data()], estimator=kfoc.KFAC())


TAKE_A_MODEL: dict[str, Call] = {
    "fit": lambda model: kfoc.fit(model, [data()]),
    "tracker": lambda model: kfoc.Tracker(model).update(*data()),
    "laplace": lambda model: kfoc.Laplace(model, curvature()),
    "influence": lambda model: kfoc.influence(model, curvature(), [data()], data()),
    "optimizer": lambda model: kfoc.NaturalGradient(model, lr=0.1),
}


@pytest.mark.parametrize("call", TAKE_A_MODEL.values(), ids=TAKE_A_MODEL)
def test_models_that_are_none(call: Call) -> None:
    for model, found in (
        (lambda x: x, "found a function"),
        (None, "found a NoneType"),
        (nn.Linear, "found the class Linear"),
    ):
        with pytest.raises(ValueError, match=rf"model must be a torch\.nn\.Module, {found}"):
            call(model)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("call", TAKE_A_MODEL.values(), ids=TAKE_A_MODEL)
def test_scripted_models(call: Call) -> None:
    for scripted in (torch.jit.script(linear()), torch.jit.trace(linear(), data()[0])):
        with pytest.raises(ValueError, match=r"pass the module that torch\.jit was given"):
            call(scripted)
        with pytest.raises(ValueError, match=r"\(its part '0'\)"):
            call(nn.Sequential(scripted))


DAMPINGS: dict[str, Call] = {
    "damped": lambda d: curvature().damped(d),
    "by layer": lambda d: curvature().damped({"0": d}),
    "redamped": lambda d: curvature().damped(1.0).redamped(d),
    "influence": lambda d: kfoc.influence(linear(), curvature(), [data()], data(), damping=d),
    "optimizer": lambda d: kfoc.NaturalGradient(linear(), lr=0.1, damping=d),
    "laplace": lambda d: kfoc.Laplace(linear(), curvature(), d),
    "laplace by layer": lambda d: kfoc.Laplace(linear(), curvature(), {"0": d}),
    "validation": lambda d: kfoc.Laplace(linear(), curvature()).tuned_by_validation([data()], [d]),
}


@pytest.mark.parametrize("call", DAMPINGS.values(), ids=DAMPINGS)
def test_dampings(call: Call) -> None:
    for bad in (math.nan, math.inf, -1.0, np.float32(math.nan), torch.tensor(-1.0)):
        with pytest.raises(ValueError, match=r"damping|prior_precision"):
            call(bad)
    for good in (0.5, 1, np.float32(0.5), torch.tensor(0.5)):
        call(good)


@pytest.mark.parametrize("call", list(DAMPINGS.values())[:-1], ids=list(DAMPINGS)[:-1])
def test_dampings_that_are_no_numbers(call: Call) -> None:
    for bad in ("x", None, True, torch.ones(2), 1j):
        with pytest.raises(ValueError, match=r"must be (a|one finite and positive) number"):
            call(bad)


COUNTS: dict[str, Call] = {
    "probes": lambda n: kfoc.fit(linear(), [data()], probes=n),
    "seed": lambda n: kfoc.fit(linear(), [data()], seed=n),
    "mc_samples": lambda n: kfoc.fit(linear(), [data()], mc_samples=n),
    "seed of the tracker": lambda n: kfoc.Tracker(linear(), seed=n).update(*data()),
    "mc_samples of it": lambda n: kfoc.Tracker(linear(), mc_samples=n).update(*data()),
    "top": lambda n: kfoc.influence(linear(), curvature(), [data()], data(), top=n),
    "chunk_size": lambda n: kfoc.influence(linear(), curvature(), [data()], data(), chunk_size=n),
    "num": lambda n: curvature().damped(1.0).sample(n),
    "num_samples": lambda n: kfoc.Laplace(linear(), curvature(), num_samples=n),
    "update_every": lambda n: kfoc.NaturalGradient(linear(), lr=0.1, update_every=n),
    "rank": lambda n: kfoc.fit(linear(), [data()], estimator=kfoc.KFOC(rank=n)),
    "max_steps": lambda n: kfoc.fit(linear(), [data()], estimator=kfoc.KFOC(max_steps=n)),
    "passes": lambda n: kfoc.fit(linear(), [data()], estimator=kfoc.KFOC("exact", passes=n)),
    "buffer": lambda n: kfoc.fit(linear(), [data()], estimator=kfoc.KFOC(buffer=n)),
}


@pytest.mark.parametrize("name", COUNTS)
@FEW_PASSES
def test_counts(name: str) -> None:
    call = COUNTS[name]
    bad = [1.5, True, "2", [2]] + (
        [None] if name not in ("top", "chunk_size", "num_samples") else []
    )
    for value in bad:
        with pytest.raises(ValueError, match=f"{name.split()[0]} must be a whole number, found"):
            call(value)
    for value in (2, np.int64(2), np.uint8(2), torch.tensor(2)):
        call(value)


def test_the_same_draws_by_any_kind_of_seed() -> None:
    model = linear()
    first, second = (kfoc.fit(model, [data()], seed=seed) for seed in (5, np.int64(5)))
    assert torch.equal(first["0"].to_dense(), second["0"].to_dense())


LIKELIHOODS: dict[str, Call] = {
    "fit": lambda given: kfoc.fit(linear(), [data()], given),
    "tracker": lambda given: kfoc.Tracker(linear(), given).update(*data()),
    "laplace": lambda given: kfoc.Laplace(linear(), curvature(), likelihood=given),
    "influence": lambda given: kfoc.influence(linear(), curvature(), [data()], data(), given),
}


@pytest.mark.parametrize("call", LIKELIHOODS.values(), ids=LIKELIHOODS)
def test_losses_in_the_place_of_likelihoods(call: Call) -> None:
    for meant, names in {
        "categorical": ["ce", "cross_entropy", nn.CrossEntropyLoss(), functional.cross_entropy],
        "gaussian": ["mse", "MSE", "regression", nn.MSELoss(), nn.MSELoss],
        "bernoulli": ["bce", nn.BCEWithLogitsLoss(), "BCEWithLogitsLoss"],
    }.items():
        for name in names:
            with pytest.raises(ValueError, match=f'for it, likelihood="{meant}"'):
                call(name)
    with pytest.raises(ValueError, match='a kind of Fisher, fisher="exact"'):
        call("type-2")
    for odd in (["categorical"], None, "hinge"):
        with pytest.raises(ValueError, match="likelihood must be one of"):
            call(odd)


def test_fisher_types_by_other_names() -> None:
    for fisher, meant in (
        ("type-1", "exact"),
        ("type-2", "exact"),
        ("MC", "mc"),
        ("mc_plain", "mc-plain"),
        ("emp", "empirical"),
        ("forward-only", "has no equivalent"),
    ):
        for call in (kfoc.fit, lambda m, d, **o: kfoc.Tracker(m, **o).update(*d[0])):
            with pytest.raises(ValueError, match=f"fisher must be one of .*{meant}"):
                call(linear(), [data()], fisher=fisher)


class OfMapping(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, batch: Any) -> Tensor:
        return self.layer(batch["x"] if isinstance(batch, dict) else batch[0])


def test_models_of_one_argument_that_holds_several() -> None:
    (x, y), model = data(), OfMapping()
    for inputs in ({"x": x}, (x, x)):
        batch = (inputs, y)
        with pytest.raises(ValueError, match=r"OfMapping.forward does not take .* pass predict="):
            kfoc.fit(model, [batch])
        options: dict[str, Any] = {"predict": lambda model, inputs: model(inputs)}
        found = kfoc.fit(model, [batch], **options)
        for call in (
            lambda o, found=found, batch=batch: kfoc.influence(model, found, [batch], batch, **o),
            lambda o, found=found, i=inputs: kfoc.Laplace(model, found, **o).probabilities(i),
        ):
            call(options)
            with pytest.raises(ValueError, match="pass predict="):
                call({})

    class Own(OfMapping):
        def forward(self, batch: Any) -> Tensor:
            raise TypeError("of the model's own")

    with pytest.raises(TypeError, match="of the model's own"):
        kfoc.fit(Own(), [(x, y)])


EMPTY = torch.empty(0, 4), torch.empty(0, dtype=torch.long)


def with_empty(batches: list[Any]) -> Iterator[Any]:
    for batch in batches:
        yield EMPTY
        yield batch
    yield EMPTY


@pytest.mark.parametrize(
    "estimator",
    [kfoc.KFOC(), kfoc.KFOC("exact", buffer=0), kfoc.KFAC(), kfoc.EigenCorrected()],
    ids=repr,
)
def test_empty_batches_are_passed_over(estimator: kfoc.Estimator, tmp_path: Any) -> None:
    model, batches = linear(), [data(), data()]
    expected = kfoc.fit(model, batches, estimator=estimator)
    for options in ({}, {"memory_budget": 10**8}, {"checkpoint": tmp_path}):
        found = kfoc.fit(model, list(with_empty(batches)), estimator=estimator, **options)
        assert found.num_samples == expected.num_samples
        assert torch.equal(found["0"].to_dense(), expected["0"].to_dense())
    with pytest.raises(ValueError, match="no batches"):
        kfoc.fit(model, [EMPTY], estimator=estimator)


@pytest.mark.filterwarnings("ignore:the best prior precision is the")
def test_empty_batches_elsewhere() -> None:
    model, batch = linear(), data()
    tracker, plain = kfoc.Tracker(model), kfoc.Tracker(model)
    for part in with_empty([batch]):
        tracker.update(*part)
    plain.update(*batch)
    assert tracker.num_batches == 1
    found, expected = (t.curvature()["0"].to_dense() for t in (tracker, plain))
    assert torch.equal(found, expected)
    model.eval()
    of_model = curvature(model)
    laplace = kfoc.Laplace(model, of_model)
    assert laplace.data_fit(with_empty([batch])) == laplace.data_fit([batch])
    several = list(with_empty([batch]))
    assert laplace.tuned_by_validation(several).prior_precision == (
        laplace.tuned_by_validation([batch]).prior_precision
    )
    scores = kfoc.influence(model, of_model, with_empty([batch]), batch, top=None).scores
    expected = kfoc.influence(model, of_model, [batch], batch, top=None).scores
    assert scores is not None
    torch.testing.assert_close(scores, expected)
    with pytest.raises(ValueError, match="the query has no samples"):
        kfoc.influence(model, of_model, [batch], EMPTY)


class Complex(nn.Module):
    def __init__(self, output: bool = False) -> None:
        super().__init__()
        self.layer, self.output = nn.Linear(4, 3), output
        self.phase = nn.Parameter(torch.ones(3, dtype=torch.complex128))
        self.mixer = nn.Linear(4, 3, dtype=torch.complex128)

    def forward(self, x: Tensor) -> Tensor:
        found = self.layer(x) * self.phase + self.mixer(x.to(torch.complex128))
        return found if self.output else found.real


def test_complex_parameters_are_skipped_and_outputs_refused() -> None:
    (x, y), model = data(), Complex()
    found = kfoc.fit(model, [(x, y)], fisher="exact", estimator=kfoc.BlockDiagonal())
    assert found.skipped == {"": "complex parameters", "mixer": "complex parameters"}
    cotangents = oracle.categorical_exact(model(x).detach())
    expected = oracle.fisher_block(model, "layer", x, cotangents)
    torch.testing.assert_close(found["layer"].to_dense(), expected)
    for name in ("", "mixer"):
        with pytest.raises(ValueError, match=f"layer '{name}' .*: complex parameters"):
            kfoc.fit(model, [(x, y)], layers=[name])
    for likelihood in ("categorical", "gaussian", "bernoulli"):
        with pytest.raises(ValueError, match=r"outputs are complex \(torch.complex128\)"):
            kfoc.fit(Complex(output=True), [(x, None)], likelihood)
    with pytest.raises(ValueError, match="outputs are complex"):
        kfoc.Laplace(Complex(output=True), found).probabilities(x)


class Steps(nn.Module):
    """(N, 4, T) to (N, T, 3), or turned round, (N, 3, T)."""

    def __init__(self, turned: bool) -> None:
        super().__init__()
        self.layer, self.turned = nn.Linear(4, 3), turned

    def forward(self, x: Tensor) -> Tensor:
        found = self.layer(x.mT)
        return found.mT if self.turned else found


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("fisher", ["mc", "exact", "empirical"])
def test_as_many_steps_as_classes(fisher: str, turned: bool) -> None:
    """The class dimension is that of the batches that showed it, and stays."""
    model, lengths = Steps(turned), (2, 3, 5)
    batches = [(torch.randn(2, 4, t), torch.randint(3, (2, t))) for t in lengths]
    options: dict[str, Any] = {"fisher": fisher, "estimator": kfoc.BlockDiagonal()}
    found = kfoc.fit(model, batches, **options)
    given = kfoc.Categorical(class_dim=1 if turned else 2)
    torch.testing.assert_close(
        found["layer"].to_dense(), kfoc.fit(model, batches, given, **options)["layer"].to_dense()
    )
    with pytest.raises(ValueError, match=r"batch 0: .*say which by likelihood"):
        kfoc.fit(model, batches[1:], **options)
    # Labels that have it otherwise than those before: (2, 5, 3) would fit (2, 3) by the other one.
    x = torch.randn(2, 4, 3)
    other = Steps(not turned)
    flipped = (torch.randn(2, 4, 5), torch.randint(3, (2, 5)))
    predict = lambda m, i: m(i) if i.shape[2] < 5 else other(i) + 0 * m(i).sum()  # noqa: E731
    with pytest.raises(ValueError, match=r"batch 1: labels .* that of earlier batches"):
        kfoc.fit(model, [batches[0], flipped], predict=predict, **options)
    tracker = kfoc.Tracker(model, **options)
    for batch in batches:
        tracker.update(*batch)
    curvature = kfoc.fit(model, batches, **options)
    model.eval()
    laplace = kfoc.Laplace(model, curvature)
    assert laplace.data_fit(batches).num_labels == 2 * sum(lengths)
    assert kfoc.influence(model, curvature, batches, batches[0]).num_samples == 6
    assert x.shape == (2, 4, 3)


def test_unlabelled_batches_settle_it_too() -> None:
    model = Steps(turned=True)
    batches = [(torch.randn(2, 4, 2), None), (torch.randn(2, 4, 5), torch.randint(3, (2, 5)))]
    with pytest.raises(ValueError, match=r"batch 1: labels .* that of earlier batches"):
        kfoc.fit(model, batches)
    kfoc.fit(model, batches[::-1])


def test_categorical_by_mistake() -> None:
    x, _ = data()
    with pytest.raises(ValueError, match=r'single class.*likelihood="bernoulli"'):
        kfoc.fit(nn.Linear(4, 1), [(x, None)])
    for dim in (5, -4, 0, -2):
        with pytest.raises(ValueError, match=f"class_dim is {dim}, and must be a dimension"):
            kfoc.fit(linear(), [data()], kfoc.Categorical(class_dim=dim))
    for options in ({"class_dim": 1.0}, {"class_dim": "1"}, {"ignore_index": 1.5}):
        with pytest.raises(ValueError, match=f"{next(iter(options))} of Categorical"):
            kfoc.Categorical(**options)


@pytest.mark.parametrize("likelihood", ["gaussian", "bernoulli"])
def test_targets_that_are_no_numbers(likelihood: str) -> None:
    x, _ = data()
    odd = {"not finite": torch.full((6, 3), math.nan), "are complex": torch.ones(6, 3) + 1j}
    for message, targets in odd.items():
        with pytest.raises(ValueError, match=f"the targets .*{message}"):
            kfoc.fit(linear(), [(x, targets)], likelihood, fisher="empirical")
