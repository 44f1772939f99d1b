"""Models in half precision and in several dtypes, vectors and blocks in another one."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import kfoc
import models

HALF = (torch.bfloat16, torch.float16)
ESTIMATORS = {**models.ESTIMATORS, "eigen": kfoc.EigenCorrected(kfoc.KFOC())}


class Mixed(nn.Module):
    """Convolutions, attention, norms and more in one dtype; a norm and the head in another."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution, self.grouped = nn.Conv2d(2, 4, 3), nn.Conv2d(4, 4, 2, groups=2)
        self.depthwise, self.norm = nn.Conv2d(4, 4, 2, groups=4), nn.LayerNorm(4)
        self.embedding, self.attention = nn.Embedding(2, 4), nn.MultiheadAttention(4, 2)
        self.rms = nn.RMSNorm(4)
        self.recurrent: nn.GRU | None = nn.GRU(4, 4)
        self.scale, self.head = nn.Parameter(torch.ones(4)), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        low = self.scale.dtype
        x = self.depthwise(self.grouped(torch.tanh(self.convolution(x.to(low)))))
        x = x.flatten(2).mT
        x = x + self.embedding((x.float().sum(-1) > 0).long())
        x = self.norm(x.to(self.norm.weight.dtype)).to(low).transpose(0, 1)
        x = x + self.attention(x, x, x, need_weights=False)[0]
        x = self.rms(x) * self.scale
        x = (x if self.recurrent is None else self.recurrent(x)[0]).mean(0)
        return self.head(x.to(self.head.weight.dtype))


def mixed(dtype: torch.dtype, rest: torch.dtype) -> Mixed:
    """Of values that half precision has exactly."""
    torch.manual_seed(0)
    model = Mixed().half().bfloat16().to(dtype)
    model.norm.to(rest)
    model.head.to(rest)
    return model


torch.manual_seed(1)
X, Y = torch.randn(8, 2, 6, 6).float(), torch.randint(3, (8,))
DATA = [(X[:5], Y[:5]), (X[5:], Y[5:])]


@pytest.mark.parametrize("rest", ["the same", torch.float32, torch.float64])
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_models_with_casts(estimator: str, dtype: torch.dtype, rest: str | torch.dtype) -> None:
    """Factors are in float32 at least, and near those of a model that is all in float32."""
    model = mixed(dtype, dtype if isinstance(rest, str) else rest)
    options = {"estimator": ESTIMATORS[estimator], "fisher": "empirical", "probes": 2}
    found = kfoc.fit(model, DATA, **options)
    whole = mixed(torch.float32, torch.float32)
    expected = kfoc.fit(whole, DATA, **options)
    assert list(found) == list(expected)
    assert not found.skipped
    for layer in found:
        assert all(tensor.element_size() >= 4 for tensor in found[layer].tensors())
        distance = found.compare(expected)[layer].relative_distance
        assert distance < (0.15 if dtype == torch.bfloat16 else 0.02), layer


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("estimator", ["kfoc", "eigen", "dense"])
def test_what_is_done_with_them(estimator: str, dtype: torch.dtype) -> None:
    model, whole = mixed(dtype, dtype), mixed(torch.float32, torch.float32)
    if estimator == "kfoc":  # without, torch.func.vmap can run the model
        model.recurrent = whole.recurrent = None
    curvature = kfoc.fit(whole, DATA, "gaussian", estimator=ESTIMATORS[estimator])
    moved = [copy.deepcopy(each) for each in (model, whole)]
    with torch.no_grad():
        for parameter in [p for each in moved for p in each.parameters()]:
            parameter.mul_(2)

    def found(model: Mixed, moved: Mixed) -> list[Tensor]:
        laplace = kfoc.Laplace(model, curvature, 3.0)
        gaussian = replace(laplace, likelihood="gaussian")
        influence = kfoc.influence(model, curvature, DATA, DATA[0], damping=1.0, top=None)
        held = kfoc.Consolidation()
        held.add(model, curvature)
        assert influence.scores is not None
        return [
            laplace.probabilities(X),
            laplace.probabilities(X, "logits", num=3),
            laplace.probabilities(X, "weights", num=3),
            gaussian.predictive(X).covariance,
            gaussian.predictive(X, "weights", num=3).mean,
            influence.scores,
            held.penalty(moved),
        ]

    pairs = zip(found(model, moved[0]), found(whole, moved[1]), strict=True)
    for place, (one, other) in enumerate(pairs):
        assert one.dtype == torch.float32
        assert (one - other).norm() < 0.05 * other.norm(), place


@pytest.mark.parametrize("estimator", ["kfoc", "rank", "kfac", "dense", "eigen"])
def test_vectors_come_back_as_they_were(estimator: str) -> None:
    """Each tensor in its own dtype, also of one layer; layers' blocks may differ too."""
    model = mixed(torch.float64, torch.float64)
    curvature = kfoc.fit(model, DATA, estimator=ESTIMATORS[estimator])
    blocks = dict(curvature.blocks)
    blocks["head"] = blocks["head"].to(dtype=torch.float32)
    curvature = replace(curvature, blocks=blocks)
    names = [name for names in curvature.parameters.values() for name in names]
    shapes = dict(model.named_parameters())
    wide = {name: torch.randn(shapes[name].shape).half().double() for name in names}
    dtypes = (torch.float64, torch.float32, torch.bfloat16)
    vector = {name: wide[name].to(dtypes[k % 3]) for k, name in enumerate(names)}
    same = {name: tensor.double() for name, tensor in vector.items()}
    for operator in (curvature.matvec, lambda v: curvature.solve(v, 1.0)):
        found, expected = operator(vector), operator(same)
        for name in names:
            assert found[name].dtype == vector[name].dtype
            torch.testing.assert_close(found[name], expected[name].to(vector[name].dtype))
    form = curvature.quadratic_form({name: tensor.half() for name, tensor in wide.items()})
    assert form.dtype == torch.float32  # a sum of squares is soon beyond float16
    torch.testing.assert_close(form.double(), curvature.quadratic_form(wide))
    assert curvature.flatten(vector).dtype == torch.float64
    for wrong in (vector[names[0]].int(), vector[names[0]] * 1j, 1.0):
        with pytest.raises(
            ValueError, match=f"floating-point tensor for the parameter '{names[0]}"
        ):
            curvature.solve(vector | {names[0]: wrong}, 1.0)  # type: ignore[operator]
    with pytest.raises(ValueError, match=r"layer|vectors must be torch.float32 on cpu"):
        curvature["head"].matvec(torch.randn(curvature["head"].shape))


@pytest.mark.parametrize("estimator", ["kfoc", "rank", "kfac", "diagonal", "dense"])
def test_sums_of_curvatures_in_two_dtypes(estimator: str) -> None:
    first, second = (
        kfoc.fit(mixed(torch.float32, torch.float32), [batch], estimator=ESTIMATORS[estimator])
        for batch in DATA
    )
    second = second.to(dtype=torch.float64)
    expected = first.to(dtype=torch.float64) + second
    for total in (first + second, second + first):
        assert {block.dtype for block in total.values()} == {torch.float64}
        for layer in total:
            assert total.compare(expected)[layer].relative_distance < 1e-6


def test_blocks_have_one_dtype() -> None:
    with pytest.raises(ValueError, match="KroneckerBlock must share dtype and device, found"):
        kfoc.KroneckerBlock(torch.eye(2), torch.eye(3).float())
    block = kfoc.KroneckerBlock(torch.eye(2), torch.eye(3))
    with pytest.raises(
        ValueError, match=r"GroupedBlock .*float32 on cpu and torch\.float64 on cpu"
    ):
        kfoc.GroupedBlock((block, block.to(dtype=torch.float32)))


@pytest.mark.parametrize("dtype", HALF)
def test_closest_products_of_half_precision(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    roots = [torch.randn(4, size, size).to(dtype).double() / 8 for size in (3, 5)]
    lefts, rights = ((root @ root.mT).to(dtype) for root in roots)
    inputs, grads = torch.randn(9, 2, 5).to(dtype), 1e-4 * torch.randn(9, 2, 3).to(dtype)
    for function, one, other in (
        (kfoc.nearest_kronecker, lefts, rights),
        (kfoc.nearest_kronecker_of_samples, inputs, grads),
    ):
        found, expected = function(one, other), function(one.double(), other.double())
        assert found.left.dtype == found.right.dtype == torch.float32
        torch.testing.assert_close(found.sigma, expected.sigma, rtol=1e-5, atol=0)
