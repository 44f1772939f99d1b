"""Every estimator on every kind of layer at every scale of float32: right, or an error."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import Tensor, nn

import kfoc
from kfoc.samples.inputs import Rows
from kfoc.samples.linear import Samples
from models import FEW_PASSES

EXTREMES = (1e-30, 1e-25, 1e-20, 1e-10, 1.0, 1e10, 1e20, 1e30)


class Branches(nn.Module):
    """A layer of every kind, each with outputs of its own. F is quadratic in inputs and factor."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3, bias=False)
        self.single = nn.Linear(4, 1, bias=False)
        self.sequence = nn.Linear(4, 2, bias=False)
        self.convolution = nn.Conv1d(4, 2, 3, bias=False)
        self.grouped = nn.Conv1d(4, 4, 3, groups=2, bias=False)
        self.depthwise = nn.Conv1d(4, 4, 3, groups=4, bias=False)
        self.biased = nn.Linear(2, 2)
        self.tokens, self.many = nn.Embedding(5, 2), nn.Embedding(1030, 2)
        self.tied, self.head = nn.Embedding(3, 2), nn.Linear(2, 3, bias=False)
        self.head.weight = self.tied.weight
        self.norm, self.gain = nn.LayerNorm(2), nn.Parameter(torch.ones(2))

    def forward(self, x: Tensor, tokens: Tensor) -> Tensor:
        few = self.tokens(tokens).mean(1)
        parts = [
            self.linear(x[:, 0]),
            self.single(x[:, 0]),
            self.sequence(x[:, :2]),
            self.convolution(x),
            self.grouped(x),
            self.depthwise(x),
            self.biased(few.detach()),
            few,
            self.many(200 * tokens).mean(1),
            self.head(torch.tanh(self.tied(tokens % 3)).mean(1)),
            self.norm(few.detach()),
            few.detach() * self.gain,
        ]
        return torch.cat([part.flatten(1) for part in parts], 1)


BY_INPUT = ["linear", "single", "sequence", "convolution", "grouped", "depthwise"]
FACTORED = [*BY_INPUT, "biased", "tokens", "many", "tied"]
EVERY = [*FACTORED, "norm", ""]
# Of these, both factors have the scale of the gradients; the others hold that of F.
ROOTS = (
    kfoc.KFOC(),
    kfoc.KFOC(buffer=0),
    kfoc.KFOC("exact", buffer=0, passes=2, rtol=0),
    kfoc.KFOC("running"),
    kfoc.KFOC("approx"),
    kfoc.KFOC(rank=2),
    kfoc.KFOC("exact", rank=2, buffer=0, passes=2, rtol=0),
)
SQUARES = (
    kfoc.KFAC(),
    kfoc.EigenCorrected(kfoc.KFAC()),
    kfoc.EigenCorrected(kfoc.KFOC(buffer=0)),
    kfoc.Diagonal(),
    kfoc.BlockDiagonal(max_size=4096),
)


def data() -> list[tuple[Tensor, Tensor]]:
    x, tokens = torch.randn(5, 4, 4), torch.randint(5, (5, 2))
    return list(zip(x.float().split(3), tokens.split(3), strict=True))


def fitted(
    estimator: kfoc.Estimator, layers: list[str], a: float, g: float, dtype: torch.dtype
) -> kfoc.Curvature:
    """Inputs times a, and output gradients times g; the same samples in every dtype."""
    torch.manual_seed(0)
    model, options = Branches().float().to(dtype), {"fisher": "exact", "probes": 2}
    if isinstance(estimator, kfoc.BlockDiagonal):
        layers = [name for name in layers if name != "many"]
    batches = [((x.to(dtype) * a, tokens), None) for x, tokens in data()]
    outputs = lambda m, inputs: m(*inputs) * g  # noqa: E731
    return kfoc.fit(
        model, batches, "gaussian", estimator=estimator, layers=layers, predict=outputs, **options
    )


def check(found: kfoc.Curvature, expected: kfoc.Curvature, a: float, g: float) -> None:
    assert list(found) == list(expected)
    for name, block in found.items():
        scale = (a * g if name in BY_INPUT else g) ** 2
        vectors = torch.randn(3, *block.shape)
        values = block.to(dtype=torch.float64).matvec(vectors) / scale
        reference = expected[name].matvec(vectors)
        assert (values - reference).norm() <= 2e-3 * reference.norm(), (name, a, g)
        assert block.relative_error == pytest.approx(expected[name].relative_error, abs=5e-3)


@FEW_PASSES
@pytest.mark.parametrize("estimator", ROOTS, ids=repr)
def test_kronecker_products_are_right_at_every_scale(estimator: kfoc.KFOC) -> None:
    expected = fitted(estimator, FACTORED, 1.0, 1.0, torch.float64)
    for g in EXTREMES:
        check(fitted(estimator, FACTORED, 1.0, g, torch.float32), expected, 1.0, g)
    expected = fitted(estimator, BY_INPUT, 1.0, 1.0, torch.float64)
    for a, g in product((1e-30, 1e30), (1.0, None)):
        g = g or 1 / a
        check(fitted(estimator, BY_INPUT, a, g, torch.float32), expected, a, g)
    for layer in ("single", "convolution", "depthwise"):  # X itself is no float32
        with pytest.raises(ValueError, match=rf"layer '{layer}': .*range of torch.float32"):
            fitted(estimator, [layer], 1e-25, 1e-25, torch.float32)


@pytest.mark.parametrize("estimator", SQUARES, ids=repr)
def test_numbers_of_the_scale_of_f_are_right_or_refused(estimator: kfoc.Estimator) -> None:
    expected = fitted(estimator, EVERY, 1.0, 1.0, torch.float64)
    for g in (1e-20, 1e-10, 1.0, 1e10, 1e15):
        check(fitted(estimator, EVERY, 1.0, g, torch.float32), expected, 1.0, g)
    for g, layer in product((1e-30, 1e-25, 1e25, 1e30), expected):
        if layer == "many" and "KFOC" in repr(estimator):
            continue  # such layers keep the base's product
        with pytest.raises(ValueError, match=rf"layer '{layer}': .*(range of|not finite)"):
            fitted(estimator, [layer], 1.0, g, torch.float32)


def test_an_eigenbasis_of_factors_that_vanished_is_refused() -> None:
    """The eigenvalues are of ordinary size, but `left` of K-FAC is not there."""
    estimator = kfoc.EigenCorrected(kfoc.KFAC())
    for g in (1e-22, 1e-25):
        with pytest.raises(ValueError, match=r"layer 'linear': .*range of torch.float32"):
            fitted(estimator, ["linear"], 1e18, g, torch.float32)


def test_a_tracker_tells_it_too() -> None:
    torch.manual_seed(0)
    model, (x, _) = nn.Linear(4, 2).float(), data()[0]
    tracker = kfoc.Tracker(
        model, "gaussian", estimator=kfoc.KFAC(), predict=lambda m, x: m(x) * 1e-25
    )
    tracker.update(x[:, 0])
    with pytest.raises(ValueError, match=r"layer '': .*near 1e-50, beyond the range"):
        tracker.curvature()


def test_layers_without_a_gradient_are_zero_and_no_error() -> None:
    for estimator in (*ROOTS, *SQUARES):
        found = fitted(estimator, FACTORED, 1.0, 0.0, torch.float32)
        assert all(not block.trace() for block in found.values())


@pytest.mark.parametrize("scale", [1e-100, 1e-45, 1e45, 1e100])
def test_products_of_samples_and_terms(scale: float) -> None:
    """By hand, without a layer: in float64 too, squares may leave even the range of Python."""
    a, g = torch.randn(4, 2, 3), torch.randn(4, 2, 2)
    fit = kfoc.nearest_kronecker_of_samples(a, g)
    if 1e-50 < scale < 1e50:
        found = kfoc.nearest_kronecker_of_samples(a * scale, g * scale)
        assert found.sigma == pytest.approx(fit.sigma * scale**4, rel=1e-9)
        torch.testing.assert_close(found.left / scale**2, fit.left)
    else:
        with pytest.raises(ValueError, match="range of float64"):
            kfoc.nearest_kronecker_of_samples(a * scale, g * scale)
        with pytest.raises(ValueError, match="range of float64"):
            Samples(Rows(a * scale), g[None] * scale).rescaled()
    least = 1e-25 if scale < 1 else 1e25
    with pytest.raises(ValueError, match=r"range of torch.float32"):
        kfoc.nearest_kronecker_of_samples((a * least).float(), (g * least).float())
    terms = torch.eye(2).expand(3, 2, 2).float() * (1e-43 if scale < 1 else 1e38)
    with pytest.raises(ValueError, match=r"range of torch.float32"):
        kfoc.nearest_kronecker(terms, terms * (1 if scale < 1 else 2))


def test_subnormal_samples() -> None:
    a, g = torch.rand(4, 1, 3) + 1, torch.rand(4, 1, 2) + 1
    small = (a * 2.0**-140).float(), (g * 2.0**100).float()
    fit = kfoc.nearest_kronecker_of_samples(small[0].double(), small[1].double())
    found = kfoc.nearest_kronecker_of_samples(*small)
    assert found.sigma == pytest.approx(fit.sigma, rel=1e-3)
    assert found.relative_error == pytest.approx(fit.relative_error, abs=1e-3)
