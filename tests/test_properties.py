"""Properties of random models, data and options, against the dense oracle.

The suite runs the same cases every time. `make nightly` runs thousands of others: see
`tests/conftest.py`.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import kfoc
import oracle
from kfoc.estimators.kfoc import AGGREGATIONS
from kfoc.plans.choose import PLANS
from random_models import Drawn, models

Draw = Callable[..., Any]
DTYPES = st.sampled_from([torch.float64, torch.float64, torch.float32])
LIMITS = st.sampled_from([2**30, 2**30, 0, 1000])

LIKELIHOODS = {
    "categorical": kfoc.Categorical(class_dim=-1),
    "gaussian": kfoc.Gaussian(),
    "bernoulli": kfoc.Bernoulli(),
}

# How far F may be off by rounding, relative to its norm, and errors against it, by dtype.
ROUNDING = {torch.float64: 1e-10, torch.float32: 3e-4}


@dataclass
class Case:
    """One fit and what it is held against."""

    drawn: Drawn
    dtype: torch.dtype
    sizes: list[int]  # of the batches
    likelihood: str
    fisher: str
    targets: Tensor | None
    seed: int

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        return tuple(x.to(self.dtype) if x.is_floating_point() else x for x in self.drawn.inputs)

    @property
    def model(self) -> nn.Module:
        return copy.deepcopy(self.drawn.model).to(self.dtype)

    def data(self) -> list[tuple[tuple[Tensor, ...], Tensor | None]]:
        split = zip(*(x.split(self.sizes) for x in self.inputs), strict=True)
        if self.targets is None:
            return [(part, None) for part in split]
        return list(zip(split, self.targets.split(self.sizes), strict=True))

    def fit(self, estimator: kfoc.Estimator, model: nn.Module) -> kfoc.Curvature:
        return kfoc.fit(
            model,
            self.data(),
            LIKELIHOODS[self.likelihood],
            estimator=estimator,
            fisher=self.fisher,
            mc_samples=2,
            seed=self.seed,
        )


@st.composite
def cases(draw: Draw) -> Case:
    count = draw(st.integers(1, 6))
    drawn = draw(models(count))
    outputs = drawn.model(*drawn.inputs)
    sizes: list[int] = []
    while sum(sizes) < count:
        sizes.append(draw(st.integers(1, count - sum(sizes))))
    several = ["categorical"] if outputs.shape[-1] > 1 else []  # a single class says nothing
    likelihood = draw(st.sampled_from([*several, "gaussian", "bernoulli"]))
    fisher = draw(st.sampled_from(["exact", "empirical", "mc"]))
    targets = None
    if fisher == "empirical" or draw(st.booleans()):
        targets = labels(draw, likelihood, outputs)
    return Case(drawn, draw(DTYPES), sizes, likelihood, fisher, targets, draw(st.integers(0, 9)))


def labels(draw: Draw, likelihood: str, outputs: Tensor) -> Tensor:
    if likelihood == "gaussian":
        return torch.randn_like(outputs)
    if likelihood == "bernoulli":
        return torch.randint_like(outputs, 2)
    found = torch.randint(outputs.shape[-1], outputs.shape[:-1])
    ignored = draw(st.sampled_from([0.0, 0.0, 0.3, 1.0]))
    return found.masked_fill(torch.rand(found.shape) < ignored, -100)


def cotangents(case: Case, outputs: Tensor) -> Tensor:
    """(S, N, *outputs): the derivatives of ln p that make the Fisher, in float64."""
    if case.fisher == "mc":  # what is drawn is tested with the likelihoods; here, that it is used
        arguments = (outputs, case.targets, "mc", 2, case.seed, 0)
        return torch.stack(list(LIKELIHOODS[case.likelihood].cotangents(*arguments))).double()
    outputs = outputs.double()
    if case.likelihood == "categorical":
        return categorical(case, outputs)
    if case.fisher == "empirical":
        assert case.targets is not None
        leaf = outputs.clone().requires_grad_()
        if case.likelihood == "gaussian":
            loss = nn.functional.mse_loss(leaf, case.targets, reduction="sum") / 2
        else:
            loss = nn.functional.binary_cross_entropy_with_logits(
                leaf, case.targets, reduction="sum"
            )
        return torch.autograd.grad(-loss, leaf)[0][None]
    exact = oracle.gaussian_exact if case.likelihood == "gaussian" else oracle.bernoulli_exact
    return exact(outputs)


def categorical(case: Case, outputs: Tensor) -> Tensor:
    if case.fisher == "empirical":
        assert case.targets is not None
        leaf = outputs.clone().requires_grad_()
        loss = nn.functional.cross_entropy(
            leaf.flatten(0, -2), case.targets.flatten(), reduction="sum", ignore_index=-100
        )
        return torch.autograd.grad(-loss, leaf)[0][None]
    places = outputs.reshape(len(outputs), -1, outputs.shape[-1])
    counts = torch.ones(places.shape[:2])
    if case.targets is not None:
        counts = (case.targets.reshape(len(outputs), -1) != -100).to(counts)
    found = []
    for place in range(places.shape[1]):
        for each in oracle.categorical_exact(places[:, place]):
            cotangent = torch.zeros_like(places)
            cotangent[:, place] = each * counts[:, place, None]
            found.append(cotangent.view_as(outputs))
    return torch.stack(found)


def expected_blocks(case: Case, curvature: kfoc.Curvature, model: nn.Module) -> dict[str, Tensor]:
    """F of every block, (o * i, o * i) in float64, from every sample run by itself."""
    directions = cotangents(case, model(*case.inputs).detach())
    exact = copy.deepcopy(model).double()
    inputs = [x.double() if x.is_floating_point() else x for x in case.inputs]
    names = [name for layout in curvature.layouts.values() for name in layout.names]
    gradients = dict(
        zip(names, oracle.gradients_alone(exact, names, inputs, directions), strict=True)
    )
    found = {}
    for layer, layout in curvature.layouts.items():
        each, kind = [gradients[name] for name in layout.names], layout.kind
        if kind == "transposed_convolution":
            each[0] = oracle.rows_of_outputs(exact.get_submodule(layer), each[0])
            kind = "rows"
        found[layer] = oracle.fisher_of(each, kind)
    return found


def estimators(draw: Draw) -> kfoc.Estimator:
    aggregation = draw(st.sampled_from(list(AGGREGATIONS)))
    options: dict[str, Any] = {
        "buffer": draw(st.sampled_from([2**19, 0, 40])),
        "memory_limit": draw(LIMITS),
        "rtol": draw(st.sampled_from([1e-6, 0.0])),
    }
    factored = kfoc.KFOC(aggregation, **options)
    many = kfoc.KFOC(draw(st.sampled_from(["online", "exact"])), rank=2, **options)
    return draw(
        st.sampled_from(
            [
                factored,
                factored,
                many,
                kfoc.BlockDiagonal(),
                kfoc.Diagonal(),
                kfoc.KFAC(),
                kfoc.EigenCorrected(factored),
                kfoc.EigenCorrected(kfoc.KFAC()),
            ]
        )
    )


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@given(st.data(), cases())
def test_fits_of_random_models(data: st.DataObject, case: Case) -> None:
    estimator = estimators(data.draw)
    model = case.model
    before = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    curvature = case.fit(estimator, model)
    assert all(torch.equal(value, before[0][key]) for key, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), before[1])
    assert all(parameter.grad is None for parameter in model.parameters())
    assert curvature.num_samples == sum(case.sizes)
    covered = [name for names in curvature.parameters.values() for name in names]
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert sorted(covered) == sorted(trained), curvature.skipped
    single = len(case.sizes) == 1
    for layer, expected in expected_blocks(case, curvature, model).items():
        check_block(curvature[layer], expected, estimator, case.dtype, single)


def check_block(
    block: kfoc.Block,
    expected: Tensor,
    estimator: kfoc.Estimator,
    dtype: torch.dtype,
    single: bool,
) -> None:
    """A block against F: exact, optimal, or no better than the optimum, as its kind says."""
    assert all(tensor.isfinite().all() for tensor in block.tensors())
    assert block.dtype == dtype
    found, precision = block.to_dense().double(), ROUNDING[dtype]
    norm = expected.norm().item()
    if isinstance(block, kfoc.DenseBlock):
        assert (found - expected).norm() <= precision * norm
    elif isinstance(block, kfoc.DiagonalBlock):
        assert (found - expected.diagonal().diag()).norm() <= precision * norm
    elif isinstance(block, kfoc.GroupedBlock):
        check_groups(block, expected, estimator, dtype, single)
    elif isinstance(block, (kfoc.KroneckerBlock, kfoc.LowRankBlock)):
        check_product(block, expected, estimator, precision, single)


def check_groups(
    block: kfoc.GroupedBlock,
    expected: Tensor,
    estimator: kfoc.Estimator,
    dtype: torch.dtype,
    single: bool,
) -> None:
    start = 0
    for part in block.blocks:
        stop = start + math.prod(part.shape)
        check_block(part, expected[start:stop, start:stop], estimator, dtype, single)
        start = stop


def check_product(
    block: kfoc.KroneckerBlock | kfoc.LowRankBlock,
    expected: Tensor,
    estimator: kfoc.Estimator,
    precision: float,
    single: bool,
) -> None:
    norm = expected.norm().item()
    missed = (block.to_dense().double() - expected).norm().item()
    o, i = block.shape
    values = torch.linalg.svdvals(oracle.rearranged(expected, o, i))
    rank = 1
    if isinstance(block, kfoc.KroneckerBlock):
        for factor in (block.left, block.right):
            check_positive(factor)
    else:
        rank = block.rank
    best = values[rank:].norm().item()
    assert missed >= best - precision * norm
    optimal = isinstance(estimator, kfoc.KFOC) and (single or estimator.aggregation == "exact")
    if optimal and block.report.converged:
        assert missed <= best + 1e-3 * norm
        if isinstance(estimator, kfoc.KFOC) and not estimator.rtol and rank == 1:
            assert missed**2 - best**2 <= 10 * precision * norm**2


def check_positive(factor: Tensor) -> None:
    """Exactly symmetric, and PSD up to the rounding that the solver allows itself."""
    assert torch.equal(factor, factor.mT)
    values = torch.linalg.eigvalsh(factor.double())
    assert values[0] >= -200 * torch.finfo(factor.dtype).eps * max(values[-1].item(), 0.0)


SHAPE = st.integers(1, 5)


@given(
    st.data(),
    st.tuples(st.integers(1, 3), SHAPE, SHAPE, SHAPE, SHAPE),
    DTYPES,
    LIMITS,
    st.integers(0, 2**16),
)
def test_solutions_of_random_samples(
    data: st.DataObject,
    shape: tuple[int, int, int, int, int],
    dtype: torch.dtype,
    memory_limit: int,
    seed: int,
) -> None:
    """Algorithm 2 by every plan, on samples of any rank and scale, with and without ties."""
    _directions, _count, positions, o, i = shape
    torch.manual_seed(seed)
    inputs, grads = samples(data.draw, shape)
    if dtype == torch.float32:
        pairs = itertools.product([1.0, 1e-20, 1e-8, 1e8, 1e15], repeat=2)
        # X itself must be a number of full precision.
        scales = data.draw(st.sampled_from([p for p in pairs if p[0] * p[1] > 1e-35]))
    else:
        pairs = itertools.product([1.0, 1e-60, 1e60], repeat=2)
        scales = data.draw(st.sampled_from(list(pairs)))
    plans = [None, *(p for p in PLANS if positions == 1 or not PLANS[p].single)]
    plan = data.draw(st.sampled_from(plans))
    rtol = data.draw(st.sampled_from([0.0, 1e-6]))
    fit = kfoc.nearest_kronecker_of_samples(
        (inputs * scales[0]).to(dtype),
        (grads * scales[1]).to(dtype),
        rtol=rtol,
        plan=plan,
        memory_limit=memory_limit,
    )
    expected = fisher(inputs, grads)
    norm, scale = expected.norm().item(), scales[0] * scales[1]
    best = torch.linalg.svdvals(oracle.rearranged(expected, o, i))[1:].norm().item()
    left, right = (factor.double() / scale for factor in (fit.left, fit.right))
    missed = (torch.kron(left, right) - expected).norm().item()
    # What rounding is relative to: positions may cancel, and most plans never form their sum.
    rounding = 20 * ROUNDING[dtype] * fisher(inputs.abs(), grads.abs()).norm().item()
    # `rtol` is about an estimate, which early plateaus fool by a factor of ten or so. And factors
    # settle to rounding slowly where two singular values are near each other.
    assert fit.converged or not rtol
    rtol = rtol if fit.converged else 1e-6
    assert missed**2 - best**2 <= (rounding + 100 * rtol * norm) * norm
    assert missed >= best - rounding
    norms = [factor.double().norm().item() for factor in (fit.left, fit.right)]
    relative = rounding / norm if norm else 0.0
    assert norms[0] == pytest.approx(norms[1], rel=1e-4 + relative)
    sigma = math.sqrt(max(norm**2 - best**2, 0.0)) * scale**2
    assert fit.sigma == pytest.approx(sigma, rel=1e-3 + relative)
    assert fit.relative_error is not None
    if norm:  # the certificate is about what is returned
        tolerance = relative + 100 * rtol
        assert fit.relative_error**2 == pytest.approx((missed / norm) ** 2, abs=tolerance)
    for factor in (fit.left, fit.right):
        check_positive(factor)


def fisher(inputs: Tensor, grads: Tensor) -> Tensor:
    """F, (o * i, o * i), from inputs (N, T, i) and gradients (S, N, T, o)."""
    rows = torch.einsum("sntj,nti->snji", grads, inputs).flatten(0, 1).flatten(1)
    return rows.mT @ rows / len(inputs)


def samples(draw: Draw, shape: tuple[int, int, int, int, int]) -> tuple[Tensor, Tensor]:
    """Inputs (N, T, i) and gradients (S, N, T, o): generic or degenerate in one way or another."""
    directions, count, positions, o, i = shape
    inputs, grads = torch.randn(count, positions, i), torch.randn(directions, count, positions, o)
    kind = draw(st.sampled_from(["generic", "zero", "same", "ties", "constant", "sparse", "heavy"]))
    if kind == "zero":
        grads = torch.zeros_like(grads)
    elif kind == "same":
        inputs, grads = inputs[:1].expand_as(inputs), grads[:, :1].expand_as(grads)
    elif kind == "ties":  # unit vectors: equal singular values
        inputs = torch.eye(i)[torch.arange(count * positions) % i].view(inputs.shape)
        places = torch.arange(directions * count * positions) % o
        grads = torch.eye(o)[places].view(grads.shape)
    elif kind == "constant":
        inputs = torch.ones_like(inputs)
    elif kind == "sparse":
        inputs = inputs * (torch.rand_like(inputs) < 0.3)
        grads = grads * (torch.rand_like(grads) < 0.3)
    elif kind == "heavy":
        grads = grads * torch.logspace(-6, 0, count)[None, :, None, None]
    return inputs, grads
