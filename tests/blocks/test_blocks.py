"""Every kind of block, every operation, against plain dense linear algebra in float64."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch

import kfoc
from curvatures import block, curvature, dense, flat, low_rank, power, psd, vector
from kfoc.blocks import KINDS, DampedBlock

CLOSE = {"rtol": 1e-9, "atol": 1e-10}
POWERS = {"matvec": 1, "solve": -1, "sqrt_matvec": 0.5, "inverse_sqrt_matvec": -0.5}
# Above what the low-rank block of these tests has of negative eigenvalues.
DAMPING = 5.0


def identity(found: kfoc.Curvature) -> torch.Tensor:
    return torch.eye(len(dense(found)))


@pytest.mark.parametrize("lead", [(), (3,), (2, 2)])
@pytest.mark.parametrize("kind", KINDS)
def test_products(kind: str, lead: tuple[int, ...]) -> None:
    found = curvature(block(kind), block(kind, 2, 5))
    fisher, v = dense(found), vector(found, *lead)
    product = found.matvec(v)
    assert {n: t.shape for n, t in product.items()} == {n: t.shape for n, t in v.items()}
    torch.testing.assert_close(flat(found, product), flat(found, v) @ fisher, **CLOSE)
    expected = torch.einsum("...p,pq,...q->...", flat(found, v), fisher, flat(found, v))
    torch.testing.assert_close(found.quadratic_form(v), expected, **CLOSE)


@pytest.mark.parametrize("kind", KINDS)
def test_scalars(kind: str) -> None:
    found = curvature(block(kind), block(kind, 2, 5))
    fisher = dense(found)
    assert found.trace() == pytest.approx(fisher.trace().item(), rel=1e-12)
    assert found.frobenius_norm() == pytest.approx(fisher.norm().item(), rel=1e-12)
    expected = torch.logdet(3 * fisher + DAMPING * identity(found)).item()
    assert found.logdet(DAMPING, scale=3.0) == pytest.approx(expected, rel=1e-10)
    torch.testing.assert_close(dense(2.5 * found), 2.5 * fisher, **CLOSE)
    assert (found * 2.5).layouts is found.layouts


@pytest.mark.parametrize("kind", KINDS)
def test_diagonals_and_eigenvalues(kind: str) -> None:
    found = curvature(block(kind), block(kind, 2, 5))
    fisher = dense(found)
    diagonal = found.diagonal()
    assert {n: t.shape for n, t in diagonal.items()} == {
        n: t.shape for n, t in vector(found).items()
    }
    torch.testing.assert_close(flat(found, diagonal), fisher.diagonal(), **CLOSE)
    inverse = torch.linalg.inv(3 * fisher + DAMPING * identity(found)).diagonal()
    damped = found.damped(DAMPING, scale=3.0)
    torch.testing.assert_close(flat(found, damped.inverse_diagonal()), inverse, **CLOSE)
    start = 0
    for layer, values in found.spectrum().items():
        rows = slice(start, start + len(values))
        expected = torch.linalg.eigvalsh(fisher[rows, rows]).flip(0)
        torch.testing.assert_close(values, expected, **CLOSE)
        assert len(values) == math.prod(found[layer].shape)
        start = rows.stop
    singular = found * 0.0
    with pytest.raises(ValueError, match=r"^layer '.*': the block is singular"):
        singular.damped(0.0).inverse_diagonal()


def test_a_damped_block_of_ones_own_has_variances() -> None:
    class Own(DampedBlock):
        def __init__(self) -> None:
            self.matrix = psd(6) + torch.eye(6)

        dtype, device, shape = torch.float64, torch.device("cpu"), (2, 3)

        def power(self, vectors: torch.Tensor, exponent: float) -> torch.Tensor:
            return (vectors.flatten(-2) @ power(self.matrix, exponent)).view(vectors.shape)

        def logdet(self) -> float:
            return 0.0

        def redamped(self, damping: kfoc.blocks.Damping) -> DampedBlock:
            return self

    own = Own()
    expected = torch.linalg.inv(own.matrix).diagonal().view(2, 3)
    torch.testing.assert_close(own.inverse_diagonal(), expected, **CLOSE)
    with pytest.raises(ValueError, match="Own does not say what its eigenvalues are"):
        own.eigenvalues()


def test_vectors_of_a_model() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2))
    x = torch.randn(5, 3)
    found = kfoc.fit(model, [(x, None)], "gaussian", layers="2", estimator=kfoc.KFAC())
    assert found.vector(model).keys() == {"2.weight", "2.bias"}
    assert found.vector(model)["2.weight"].data_ptr() == model[2].weight.data_ptr()
    assert not found.vector(model)["2.weight"].requires_grad
    model[2].bias.requires_grad_(False)
    model(x).sum().backward()
    gradient = found.vector(model, grad=True)
    assert torch.equal(gradient["2.weight"], model[2].weight.grad)
    assert not gradient["2.bias"].any()
    assert found.quadratic_form(gradient) > 0
    with pytest.raises(
        ValueError, match=r"layer '2'.*'2.weight' of \[2, 4\], and the model no such"
    ):
        found.vector(model[:1])
    model[2] = torch.nn.Linear(4, 3)
    with pytest.raises(ValueError, match=r"'2.weight' of \[2, 4\], and the model one of \[3, 4\]"):
        found.vector(model)


@pytest.mark.parametrize("lead", [(), (3,)])
@pytest.mark.parametrize("kind", KINDS)
def test_damped_powers(kind: str, lead: tuple[int, ...]) -> None:
    found = curvature(block(kind), block(kind, 2, 5))
    v = vector(found, *lead)
    solved = found.damped(0.1 + DAMPING, scale=0.5).redamped(DAMPING, scale=2.0)
    matrix = 2 * dense(found) + DAMPING * identity(found)
    for name, exponent in POWERS.items():
        expected = flat(found, v) @ power(matrix, exponent)
        result = getattr(solved, name)(v)
        torch.testing.assert_close(flat(found, result), expected, **CLOSE)
    forms = {1: solved.quadratic_form(v), -1: solved.inverse_quadratic_form(v)}
    for exponent, form in forms.items():
        expected = (flat(found, v) @ power(matrix, exponent) * flat(found, v)).sum(-1)
        torch.testing.assert_close(form, expected, **CLOSE)
    assert solved.logdet() == pytest.approx(torch.logdet(matrix).item(), rel=1e-10)
    matrix = dense(found) + DAMPING * identity(found)
    for name in ("solve", "sqrt_matvec", "inverse_sqrt_matvec"):
        expected = flat(found, v) @ power(matrix, POWERS[name])
        result = getattr(found, name)(v, DAMPING)
        torch.testing.assert_close(flat(found, result), expected, **CLOSE)


@pytest.mark.parametrize("kind", KINDS)
def test_samples_have_the_inverse_as_covariance(kind: str) -> None:
    found = curvature(block(kind, 2, 3), block(kind, 2, 2))
    count = 40_000
    draws = flat(found, found.sample(count, DAMPING, scale=3.0, seed=5))
    assert draws.shape == (count, 10)
    covariance = power(3 * dense(found) + DAMPING * identity(found), -1)
    # Standard errors of the mean and of the covariance of so many draws, times five.
    spread = covariance.diagonal().sqrt() / math.sqrt(count)
    assert (draws.mean(0).abs() < 5 * spread).all()
    deviation = (2 * covariance.diagonal()[:, None] * covariance.diagonal() / count).sqrt()
    assert ((draws.mT @ draws / count - covariance).abs() < 5 * deviation).all()


def test_samples_follow_seed_and_generator() -> None:
    found = curvature(block("KroneckerBlock"), block("DiagonalBlock"))
    state = torch.random.get_rng_state()
    first, again, other = (flat(found, found.sample(2, seed=seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    generator = torch.Generator().manual_seed(1)
    continued = [flat(found, found.sample(2, generator=generator)) for _ in range(2)]
    assert torch.equal(continued[0], first)
    assert not torch.equal(continued[1], first)
    assert torch.equal(state, torch.random.get_rng_state())
    with pytest.raises(ValueError, match="num must be at least 1"):
        found.sample(0)


PAIRS = list(itertools.product(KINDS, KINDS))


@pytest.mark.parametrize(("first", "second"), PAIRS)
def test_comparison_of_any_two_kinds(first: str, second: str) -> None:
    a, b = block(first), block(second)
    found = curvature(a).compare(curvature(b))["0"]
    A, B = a.to_dense(), b.to_dense()
    assert found.relative_distance == pytest.approx(((A - B).norm() / A.norm()).item(), rel=1e-9)
    cosine = (A * B).sum() / (A.norm() * B.norm())
    assert found.cosine == pytest.approx(cosine.item(), rel=1e-9)
    same = curvature(a).compare(curvature(a))["0"]
    assert same.relative_distance == pytest.approx(0, abs=1e-7)


def test_comparison_of_zeros_and_of_tiny_blocks() -> None:
    zero = kfoc.DiagonalBlock(torch.zeros(2, 2))
    other = kfoc.KroneckerBlock(psd(2), psd(2))
    assert curvature(zero).compare(curvature(zero))["0"].relative_distance == 0
    assert curvature(other).compare(curvature(zero))["0"].relative_distance == 1
    assert curvature(zero).compare(curvature(other))["0"].relative_distance == math.inf
    assert math.isnan(curvature(zero).compare(curvature(other))["0"].cosine)
    tiny = kfoc.KroneckerBlock(psd(2).float() * 1e-18, psd(2).float() * 1e-18)
    twice = curvature(tiny).compare(2 * curvature(tiny))["0"]
    assert twice.relative_distance == pytest.approx(1, rel=1e-5)
    assert twice.cosine == pytest.approx(1, rel=1e-5)


def test_groups_of_other_kinds() -> None:
    """Low-rank and eigen-corrected parts, as EigenCorrected and KFOC(rank=2) make them."""
    for kind in ("LowRankBlock", "EigenBlock"):
        found = curvature(kfoc.GroupedBlock((block(kind), block(kind))))
        v = vector(found, 2)
        matrix = dense(found) + DAMPING * identity(found)
        expected = flat(found, v) @ power(matrix, -1)
        torch.testing.assert_close(flat(found, found.solve(v, DAMPING)), expected, **CLOSE)
        for other in ("KroneckerBlock", "EigenBlock", "DenseBlock", "DiagonalBlock"):
            a, b = found["0"], block(other, 8, 3)
            expected_inner = (a.to_dense() * b.to_dense()).sum().item()
            assert a.inner(b) == pytest.approx(expected_inner, rel=1e-9)
            assert b.inner(a) == pytest.approx(expected_inner, rel=1e-9)


def test_pi_damping_is_factored() -> None:
    a, b = psd(4), psd(3)
    found = curvature(kfoc.KroneckerBlock(a, b), kfoc.DiagonalBlock(torch.rand(2, 2)))
    v, damping, scale = vector(found), 0.3, 5.0
    pi = math.sqrt((b.trace() / 3) / (a.trace() / 4))
    root = math.sqrt(damping)
    left = math.sqrt(scale) * a + root / pi * torch.eye(4)
    right = math.sqrt(scale) * b + root * pi * torch.eye(3)
    rest = scale * found["1"].to_dense() + damping * torch.eye(4)
    matrix = torch.block_diag(torch.kron(left, right), rest)
    solved = found.damped(damping, method="pi", scale=scale)
    torch.testing.assert_close(
        flat(found, solved.solve(v)), torch.linalg.solve(matrix, flat(found, v)), **CLOSE
    )
    assert solved.logdet() == pytest.approx(torch.logdet(matrix).item())
    # The cross terms make it larger than exact damping, in the semi-definite order.
    exact = scale * dense(found) + damping * torch.eye(16)
    assert torch.linalg.eigvalsh(matrix - exact)[0] > -1e-12
    zero = curvature(kfoc.KroneckerBlock(torch.zeros(2, 2), torch.zeros(2, 2)))
    assert zero.logdet(0.3, method="pi") == pytest.approx(4 * math.log(0.3))


def test_damping_by_layer() -> None:
    found = curvature(block("KroneckerBlock"), block("DiagonalBlock"))
    v = vector(found)
    each = torch.cat([torch.full((12,), 0.5), torch.full((12,), 2.0)])
    expected = torch.linalg.solve(dense(found) + torch.diag(each), flat(found, v))
    solved = found.solve(v, {"0": 0.5, "1": 2.0})
    torch.testing.assert_close(flat(found, solved), expected, **CLOSE)
    with pytest.raises(ValueError, match=r"missing: \['1'\], unknown: \['2'\]"):
        found.solve(v, {"0": 0.5, "2": 1.0})


@pytest.mark.parametrize("kind", KINDS)
def test_singular_blocks_need_damping(kind: str) -> None:
    whole = block(kind)
    if kind == "LowRankBlock":
        singular: kfoc.Block = kfoc.LowRankBlock(psd(4, 2)[None], psd(3)[None])
    else:
        singular = whole.mapped(lambda t: torch.zeros_like(t) if t.shape[0] != 99 else t)
    found = curvature(block("DiagonalBlock"), singular)
    v = vector(found)
    for operation in (
        lambda: found.solve(v, 0.0),
        lambda: found.inverse_sqrt_matvec(v, 0.0),
        lambda: found.logdet(0.0),
        lambda: found.sample(1, 0.0),
    ):
        with pytest.raises(ValueError, match=r"layer '1': .*damping must"):
            operation()
    result = flat(found, found.solve(v, 1e-6))
    assert result.isfinite().all()
    assert math.isfinite(found.logdet(1e-6))


def test_nothing_is_asked_of_the_damping_of_regular_blocks() -> None:
    found = curvature(block("KroneckerBlock"))
    v = vector(found)
    torch.testing.assert_close(
        flat(found, found.solve(v, 0.0)), torch.linalg.solve(dense(found), flat(found, v))
    )
    assert found.logdet(0.0) == pytest.approx(torch.logdet(dense(found)).item())


@pytest.mark.parametrize("damping", [-1.0, math.nan, math.inf])
def test_bad_damping(damping: float) -> None:
    with pytest.raises(ValueError, match="damping must be finite and not negative"):
        curvature(block("DiagonalBlock")).damped(damping)


SINGLE = torch.zeros(1, dtype=torch.float32)
PLACES: dict[str, tuple[tuple, dict, torch.dtype, str]] = {
    "nothing": ((), {}, torch.float64, "cpu"),
    "dtype": ((torch.float32,), {}, torch.float32, "cpu"),
    "dtype=": ((), {"dtype": torch.float32}, torch.float32, "cpu"),
    "device": (("meta",), {}, torch.float64, "meta"),
    "device=": ((), {"device": torch.device("meta")}, torch.float64, "meta"),
    "device, dtype": (("meta", torch.float32), {}, torch.float32, "meta"),
    "device, dtype=": (("meta",), {"dtype": torch.float32}, torch.float32, "meta"),
    "None, dtype": ((None, torch.float32), {}, torch.float32, "cpu"),
    "tensor": ((SINGLE.to("meta"),), {}, torch.float32, "meta"),
}


@pytest.mark.parametrize("case", PLACES)
@pytest.mark.parametrize("kind", KINDS)
def test_to_takes_what_that_of_tensors_takes(kind: str, case: str) -> None:
    args, names, dtype, device = PLACES[case]
    found = curvature(block(kind))
    for each in (found["0"].to(*args, **names), found.to(*args, **names)["0"]):
        assert {(t.dtype, t.device.type) for t in each.tensors()} == {(dtype, device)}


@pytest.mark.parametrize("at", [lambda c: c, lambda c: c["0"]], ids=["curvature", "block"])
def test_to_refuses_what_is_no_place(at: Callable) -> None:
    found = at(curvature(block("KroneckerBlock")))
    for args, names in [
        ((torch.int64,), {}),
        ((), {"dtype": torch.bool}),
        ((torch.zeros(1, dtype=torch.int32),), {}),
        ((torch.complex64,), {}),
    ]:
        with pytest.raises(ValueError, match="dtype must be a floating-point one, found torch"):
            found.to(*args, **names)
    for args, names in [
        ((1.5,), {}),
        ((torch.float32, torch.float64), {}),
        (("cpu",), {"device": "cpu"}),
        ((SINGLE,), {"dtype": torch.float64}),
    ]:
        with pytest.raises(TypeError, match=r"to\(\) takes a device, a dtype, both, or a tensor"):
            found.to(*args, **names)


def test_to_refuses_a_range_that_is_too_small() -> None:
    with pytest.raises(ValueError, match=r"layer '0' is beyond the range of torch\.float16"):
        (1e9 * curvature(block("DiagonalBlock"))).to(torch.float16)


def test_bad_arguments() -> None:
    found = curvature(block("DiagonalBlock"), block("KroneckerBlock"))
    v = vector(found)
    with pytest.raises(ValueError, match="method must be one of exact, pi, found 'tikhonov'"):
        found.damped(1.0, method="tikhonov")
    with pytest.raises(ValueError, match="scale must be finite and positive"):
        found.damped(1.0, scale=0.0)
    with pytest.raises(ValueError, match=r"lacks 0\.bias, 1\.weight"):
        found.matvec({k: v[k] for k in ("0.weight", "1.bias")})
    with pytest.raises(ValueError, match=r"has head\.weight besides"):
        found.matvec({**v, "head.weight": torch.ones(2)})
    with pytest.raises(ValueError, match=r"'1\.bias' must end in its shape \(4,\), found \(5,\)"):
        found.matvec({**v, "1.bias": torch.ones(5)})
    with pytest.raises(ValueError, match="share their leading dimensions"):
        found.matvec({**v, "1.bias": torch.ones(2, 4), "1.weight": torch.ones(2, 4, 2)})
    with pytest.raises(ValueError, match="factor must be finite and not negative"):
        -1 * found
    with pytest.raises(TypeError):
        found * "2"
    with pytest.raises(ValueError, match="dtype must be a floating-point one"):
        found.to(dtype=torch.int64)


def test_vectors_keep_their_dtype() -> None:
    found = curvature(block("KroneckerBlock"))
    v = {name: tensor.float() for name, tensor in vector(found).items()}
    for result in (found.matvec(v), found.solve(v)):
        assert {t.dtype for t in result.values()} == {torch.float32}
    single = found.to(dtype=torch.float32)
    assert {t.dtype for t in single.sample(2).values()} == {torch.float32}
    assert single.to(dtype=torch.bfloat16)["0"].left.dtype == torch.bfloat16
    half = single.to(dtype=torch.bfloat16)
    torch.testing.assert_close(
        flat(found, half.solve(v)), flat(found, single.solve(v)), rtol=0.1, atol=0.1
    )


@pytest.mark.parametrize("kind", KINDS)
def test_float32(kind: str) -> None:
    found = curvature(block(kind), block(kind, 2, 5))
    single, v = found.to(dtype=torch.float32), vector(found, 2)
    for name in POWERS:
        wide, narrow = (flat(c, getattr(c.damped(DAMPING), name)(v)) for c in (found, single))
        assert narrow.dtype == torch.float64
        torch.testing.assert_close(narrow, wide, rtol=1e-4, atol=1e-4)
    assert single.logdet(DAMPING) == pytest.approx(found.logdet(DAMPING), rel=1e-5)
    assert single.frobenius_norm() == pytest.approx(found.frobenius_norm(), rel=1e-6)


def test_matrices_that_are_not_semi_definite_are_refused() -> None:
    for bad in (
        kfoc.KroneckerBlock(torch.diag(torch.tensor([1.0, -0.5])), torch.eye(2)),
        kfoc.DiagonalBlock(torch.tensor([[1.0, 2.0], [1.0, -0.5]])),
        kfoc.DenseBlock(torch.diag(torch.tensor([1.0, 1.0, 1.0, -0.5])), (2, 2)),
        kfoc.EigenBlock(torch.eye(2), torch.eye(2), torch.tensor([[1.0, 2.0], [1.0, -0.5]])),
    ):
        with pytest.raises(ValueError, match=r"layer '0': .*not positive semi-definite"):
            curvature(bad).damped(1.0)
    with pytest.raises(ValueError, match="values that are not finite"):
        curvature(kfoc.KroneckerBlock(torch.full((2, 2), math.nan), torch.eye(2))).damped(1.0)


def test_nearly_singular_float32_factors() -> None:
    """Rounding makes eigenvalues negative: clamped, so that small dampings stay solvable."""
    rows = torch.randn(3, 40, dtype=torch.float64)
    left = (rows.mT @ rows).float()
    assert torch.linalg.eigvalsh(left)[0] < 0
    found = curvature(kfoc.KroneckerBlock(left, left[:20, :20].contiguous()))
    v = {name: tensor.float() for name, tensor in vector(found).items()}
    solved = flat(found, found.solve(v, 1e-8))
    assert solved.isfinite().all()
    assert found.damped(1e-8).inverse_quadratic_form(v) > 0
    assert math.isfinite(found.logdet(1e-8))


def test_eigendecomposition_falls_back_on_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    real = torch.linalg.eigh

    def failing(matrix: torch.Tensor) -> object:
        if matrix.dtype != torch.float64:
            raise torch.linalg.LinAlgError("did not converge")
        return real(matrix)

    found = curvature(kfoc.KroneckerBlock(psd(4).float(), psd(3).float()))
    v = {name: tensor.float() for name, tensor in vector(found).items()}
    expected = found.solve(v)
    monkeypatch.setattr(torch.linalg, "eigh", failing)
    found.forget()
    again = found.solve(v)
    for name in v:
        assert again[name].dtype == torch.float32
        torch.testing.assert_close(again[name], expected[name], rtol=1e-4, atol=1e-5)
    monkeypatch.setattr(torch.linalg, "eigh", lambda matrix: failing(matrix.float()))
    found.forget()
    with pytest.raises(ValueError, match="eigendecomposition of the left factor failed"):
        found.solve(v)


def test_indefinite_sums_are_refused_where_damping_does_not_cover_them() -> None:
    found = curvature(low_rank(4, 3))
    smallest = torch.linalg.eigvalsh(dense(found))[0].item()
    assert smallest < -1e-3
    for operation in (found.solve, found.sqrt_matvec):
        with pytest.raises(ValueError, match=r"the block is indefinite \(smallest eigenvalue"):
            operation(vector(found), -smallest * 0.99)
    assert math.isfinite(found.logdet(-smallest * 1.01))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_numbers_that_are_not_finite_do_not_compare(kind: str, value: float) -> None:
    good = curvature(block(kind))
    bad = curvature(good["0"].mapped(lambda tensor: tensor * value))
    for first, second in ((good, bad), (bad, good)):
        with pytest.raises(
            ValueError, match="layer '0': the blocks have norms that are not finite"
        ):
            first.compare(second)
