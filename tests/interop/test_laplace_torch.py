"""The backend for laplace-torch, in the real package, against its own backends."""

from __future__ import annotations

import copy
import importlib
import sys
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import kfoc
import oracle

with warnings.catch_warnings():  # of the packages that it imports
    warnings.simplefilter("ignore")
    laplace = pytest.importorskip("laplace")
    from laplace.curvature import CurvlinopsEF, CurvlinopsGGN
    from laplace.utils.matrix import Kron
from kfoc.interop.laplace_torch import KFOCBackend, MergingKron

# The first forward-mode derivative in a process has torch load what it calls deprecated itself.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")

LIKELIHOODS = ("classification", "regression")
ESTIMATOR = kfoc.KFOC(rtol=1e-13, max_steps=400)


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))


def loader(likelihood: str, count: int = 30, size: int = 10, seed: int = 0) -> DataLoader:
    torch.manual_seed(seed)
    targets = {"classification": torch.randint(3, (count,)), "regression": torch.randn(count, 3)}
    data = TensorDataset(torch.randn(count, 5), targets[likelihood])
    return DataLoader(data, batch_size=size)


def fitted(
    model: nn.Module,
    data: DataLoader,
    likelihood: str = "classification",
    weights: str = "all",
    structure: str = "kron",
    backend: Any = KFOCBackend,
    **options: Any,
) -> Any:
    found = laplace.Laplace(
        model,
        likelihood,
        subset_of_weights=weights,
        hessian_structure=structure,
        backend=backend,
        backend_kwargs=options,
        prior_precision=0.7,
    )
    found.fit(data)
    return found


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
@pytest.mark.parametrize("weights", ["all", "last_layer"])
@pytest.mark.parametrize("fisher", ["exact", "empirical"])
def test_kfac_is_that_of_laplace_torch(likelihood: str, weights: str, fisher: str) -> None:
    model, data = network(), loader(likelihood)
    ours = fitted(model, data, likelihood, weights, fisher=fisher, estimator=kfoc.KFAC())
    backend = CurvlinopsGGN if fisher == "exact" else CurvlinopsEF
    theirs = fitted(model, data, likelihood, weights, backend=backend)
    # Their empirical Fisher of squared errors is that of a variance of 1/2, times 1/2.
    unit = 0.5 if (likelihood, fisher) == ("regression", "empirical") else 1.0
    torch.testing.assert_close(ours.H_facs.to_matrix(), unit * theirs.H_facs.to_matrix())
    assert ours.loss.item() == pytest.approx(theirs.loss.item())
    if unit == 1.0:
        marginals = [each.log_marginal_likelihood().item() for each in (ours, theirs)]
        assert marginals[0] == pytest.approx(marginals[1])
        x = torch.randn(4, 5)
        first, second = (each(x) for each in (ours, theirs))
        torch.testing.assert_close(first, second)


def test_kfac_of_convolutions() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 2, bias=False), nn.ReLU(), nn.Flatten())
    model.append(nn.Linear(18, 3, bias=False))
    data = DataLoader(TensorDataset(torch.randn(8, 1, 4, 4), torch.randint(3, (8,))), batch_size=3)
    ours = fitted(model, data, estimator=kfoc.KFAC())
    theirs = fitted(model, data, backend=CurvlinopsGGN)
    torch.testing.assert_close(ours.H_facs.to_matrix(), theirs.H_facs.to_matrix())


def weight_parts(model: nn.Module, full: Tensor) -> list[Tensor]:
    """The diagonal blocks of laplace-torch's full matrix, one per parameter."""
    sizes, start, found = [p.numel() for p in model.parameters()], 0, []
    for size in sizes:
        found.append(full[start : start + size, start : start + size])
        start += size
    return found


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_one_batch_gives_the_closest_products_to_the_full_matrix(likelihood: str) -> None:
    model, data = network(), loader(likelihood, size=30)
    full = fitted(model, data, likelihood, structure="full", backend=CurvlinopsGGN).H
    kron = fitted(model, data, likelihood, estimator=ESTIMATOR).H_facs
    parts = zip(model.parameters(), weight_parts(model, full), kron.kfacs, strict=True)
    for parameter, exact, factors in parts:
        if len(factors) == 1:
            torch.testing.assert_close(factors[0], exact)
        else:
            best, _, _ = oracle.optimum(exact, *parameter.shape)
            torch.testing.assert_close(torch.kron(*factors), best, rtol=1e-6, atol=1e-8)


def test_batches_are_merged_by_algorithm_1() -> None:
    model, data = network(), loader("classification")
    full = [
        fitted(
            model, DataLoader(TensorDataset(*batch), 10), structure="full", backend=CurvlinopsGGN
        ).H
        for batch in data
    ]
    kron = fitted(model, data, estimator=ESTIMATOR).H_facs
    shape = model[0].weight.shape
    best = None
    for matrix in full:
        batch, _, _ = oracle.optimum(weight_parts(model, matrix)[0], *shape)
        best = batch if best is None else oracle.optimum(best + batch, *shape)[0]
    torch.testing.assert_close(torch.kron(*kron.kfacs[0]), best, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(kron.kfacs[1][0], sum(weight_parts(model, m)[1] for m in full))


@pytest.mark.parametrize("weights", ["all", "last_layer"])
def test_a_finished_curvature_is_handed_through(weights: str) -> None:
    model, data = network(), loader("classification", count=25)
    apart = [name for name, _ in model.named_parameters()]
    estimator = kfoc.KFOC("exact")
    curvature = kfoc.fit(model, data, fisher="exact", estimator=estimator, layers=apart)
    found = fitted(model, data, weights=weights, curvature=curvature)
    layers = ("0", "2") if weights == "all" else ("2",)
    expected = [curvature[f"{layer}.{part}"] for layer in layers for part in ("weight", "bias")]
    dense = torch.block_diag(*[25 * block.to_dense() for block in expected])
    torch.testing.assert_close(found.H_facs.to_matrix(), dense)
    with pytest.raises(ValueError, match="is of 25 samples, and the data set has 30"):
        fitted(model, loader("classification"), curvature=curvature)


def test_joint_curvatures_lose_the_covariance_of_weight_and_bias_alone() -> None:
    model = nn.Sequential(nn.Linear(5, 4), nn.LayerNorm(4), nn.Linear(4, 3))
    data = loader("classification", size=30)
    for estimator in (kfoc.KFOC(), kfoc.BlockDiagonal(), kfoc.Diagonal()):
        curvature = kfoc.fit(model, data, fisher="exact", estimator=estimator)
        found = fitted(model, data, curvature=curvature).H_facs.to_matrix()
        start = 0
        for layer, layout in curvature.layouts.items():
            places = layout.split(
                torch.arange(curvature[layer].to_dense().shape[0]).view(layout.shape)
            )
            for place in places.values():
                at = place.flatten()
                part = slice(start, start + len(at))
                expected = 30 * curvature[layer].to_dense()[at][:, at]
                torch.testing.assert_close(found[part, part], expected)
                start = part.stop
        assert start == len(found)


@pytest.mark.parametrize("estimator", [kfoc.KFAC(), ESTIMATOR])
def test_a_second_data_set_adds_up(estimator: Any) -> None:
    model = network()
    first, second = loader("classification", 20, 20), loader("classification", 10, 10, seed=1)
    both = fitted(model, first, estimator=estimator)
    alone = [fitted(model, data, estimator=estimator).H_facs for data in (first, second)]
    both.fit(second, override=False)
    expected = (alone[0] + alone[1]).to_matrix()
    torch.testing.assert_close(both.H_facs.to_matrix(), expected)
    assert both.n_data == 30
    if isinstance(estimator, kfoc.KFAC):
        theirs = fitted(model, first, backend=CurvlinopsGGN)
        theirs.fit(second, override=False)
        torch.testing.assert_close(both.H_facs.to_matrix(), theirs.H_facs.to_matrix())


@pytest.mark.filterwarnings("ignore:By default `link_approx`")
def test_what_laplace_torch_does_with_it() -> None:
    model, data = network(), loader("classification")
    found = fitted(model, data, fisher="mc", mc_samples=2)
    x = torch.randn(4, 5)
    for options in ({}, {"link_approx": "mc"}, {"pred_type": "nn", "link_approx": "mc"}):
        probabilities = found(x, **options)
        torch.testing.assert_close(probabilities.sum(-1), torch.ones(4))
    found.optimize_prior_precision(method="marglik", n_steps=5)
    assert found.log_marginal_likelihood().isfinite()
    regression = fitted(model, loader("regression"), "regression")
    assert regression.log_marginal_likelihood(sigma_noise=torch.tensor(0.5)).isfinite()
    assert regression(x)[1].shape == (4, 3, 3)


def test_saved_and_loaded_states_predict_the_same() -> None:
    model, data = network(), loader("classification")
    found, other = fitted(model, data), fitted(model, loader("classification", seed=1))
    other.load_state_dict(found.state_dict())
    x = torch.randn(4, 5)
    torch.testing.assert_close(other(x), found(x))


@pytest.mark.parametrize("estimator", [kfoc.KFAC(), ESTIMATOR])
def test_loaded_states_go_on(estimator: Any) -> None:
    model, first = network(), loader("classification", 20, 20)
    data = loader("classification", 15, 5, seed=1)
    whole, other = (fitted(model, first, estimator=estimator) for _ in range(2))
    state = copy.deepcopy(whole.state_dict())
    other.fit(data)
    other.load_state_dict(state)
    for each in (whole, other):
        each.fit(data, override=False)
    torch.testing.assert_close(other.H_facs.to_matrix(), whole.H_facs.to_matrix())
    assert other.H_facs.num_samples == whole.H_facs.num_samples == other.n_data == 35
    torch.testing.assert_close(other(torch.ones(1, 5)), whole(torch.ones(1, 5)))


def test_what_would_make_no_difference_is_refused() -> None:
    model, data = network(), loader("classification")
    options = ({"passes": 3}, {"decay": 0.9}, {"buffer": 7})
    estimators = [kfoc.KFOC("exact"), kfoc.KFOC("approx"), *(kfoc.KFOC(**o) for o in options)]
    for estimator in estimators:
        with pytest.raises(ValueError, match="each batch is fitted alone"):
            fitted(model, data, estimator=estimator)
    fitted(model, data, estimator=kfoc.KFOC("running", rtol=1e-3))
    curvature = kfoc.fit(model, data)
    with pytest.raises(ValueError, match="leave out one of them"):
        fitted(model, data, estimator=kfoc.KFAC(), curvature=curvature)


@pytest.mark.parametrize("weights", ["all", "last_layer"])
@pytest.mark.parametrize("structure", ["full", "diag"])
def test_other_structures_say_what_to_do(structure: str, weights: str) -> None:
    with pytest.raises(ValueError, match=f'"{structure}" asks for another form: use'):
        fitted(network(), loader("classification"), weights=weights, structure=structure)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_refused_before_the_fit(dtype: torch.dtype) -> None:
    with pytest.raises(ValueError, match=r"'0.weight' is torch\..*float16, .*model.float\(\)"):
        KFOCBackend(network().to(dtype), "classification")


def test_a_single_layer_and_normalisation() -> None:
    data = loader("classification", size=30)
    single = KFOCBackend(nn.Linear(5, 3), "classification")
    assert len(single.kron(*next(iter(data)), N=30)[1]) == 2
    model = nn.Sequential(nn.Linear(5, 1100), nn.LayerNorm(1100), nn.Linear(1100, 3))
    kron = fitted(model, loader("classification", size=15)).H_facs
    assert [factors[0].ndim for factors in kron.kfacs] == [2, 2, 1, 1, 2, 2]


def test_models_of_dicts() -> None:
    class OfDict(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(5, 3)

        def forward(self, batch: dict[str, Tensor]) -> Tensor:
            return self.layer(batch["input_ids"])

    model = OfDict()
    x, y = torch.randn(6, 5), torch.randint(3, (6,))
    ours = KFOCBackend(model, "classification", estimator=kfoc.KFAC())
    theirs = KFOCBackend(model.layer, "classification", estimator=kfoc.KFAC())
    pairs = ours.kron({"input_ids": x}, y, 6), theirs.kron(x, y, 6)
    assert pairs[0][0] == pairs[1][0]
    torch.testing.assert_close(pairs[0][1].to_matrix(), pairs[1][1].to_matrix())


def test_frozen_parameters_are_left_out() -> None:
    model = network()
    model[0].requires_grad_(False)
    found = fitted(model, loader("classification"))
    assert len(found.H_facs) == 2


def test_no_silently_wrong_factors() -> None:
    grouped = nn.Sequential(
        nn.Unflatten(1, (1, 5)), nn.Conv1d(1, 2, 2), nn.Conv1d(2, 2, 2, groups=2)
    )
    grouped.append(nn.Flatten())
    with pytest.raises(ValueError, match=r"layer '2\.weight': a GroupedBlock of rows"):
        fitted(grouped, loader("classification"))
    model, data = network(), loader("classification")
    curvature = kfoc.fit(model, data, layers="2")
    with pytest.raises(ValueError, match=r"'0\.weight', which has no block: the curvature was"):
        fitted(model, data, curvature=curvature)
    corrected = kfoc.fit(model, data, estimator=kfoc.EigenCorrected())
    with pytest.raises(ValueError, match="layer '0': a EigenBlock"):
        fitted(model, data, curvature=corrected)
    ours, theirs = fitted(model, data), fitted(model, data, backend=CurvlinopsGGN)
    for first, second in ((ours, theirs), (theirs, ours)):
        with pytest.raises(ValueError, match="of another origin"):
            first.H_facs + second.H_facs
    with pytest.raises(ValueError, match="no further options, found mc"):
        ours.backend.kron(*next(iter(data)), N=30, mc=3)
    with pytest.raises(ValueError, match="a part of a layer's parameters"):
        KFOCBackend(model, "regression", subnetwork_indices=torch.arange(3))
    with pytest.raises(ValueError, match="likelihood must be one of"):
        KFOCBackend(model, "poisson")


def test_sums_with_zeros_and_products_with_numbers() -> None:
    found = fitted(network(), loader("classification")).H_facs
    zeros = Kron([[torch.zeros_like(f) for f in factors] for factors in found.kfacs])
    for total in (zeros + found, found + zeros):
        assert isinstance(total, MergingKron)
        torch.testing.assert_close(total.to_matrix(), found.to_matrix())
    torch.testing.assert_close((3.0 * found).to_matrix(), 3 * found.to_matrix())


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "laplace"]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "kfoc.interop.laplace_torch")
    with pytest.raises(ImportError, match="pip install laplace-torch"):
        importlib.import_module("kfoc.interop.laplace_torch")
