"""Eigendecompositions are made once and kept; products are solved with by Cholesky."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import kfoc
from curvatures import block, curvature, dense, flat, psd, vector
from kfoc.blocks import KINDS, Damping
from kfoc.blocks.cholesky import DampedProduct
from kfoc.blocks.damped import DampedSpectrum
from kfoc.blocks.decomposed import DecomposedBlock
from kfoc.curvature import file as storage

CLOSE = {"rtol": 1e-9, "atol": 1e-10}
DAMPING = 5.0  # above what the low-rank block of these tests has of negative eigenvalues
# Those that take eigendecompositions, and how many.
COUNTS = {
    "KroneckerBlock": 2,
    "KroneckerDiagonalBlock": 1,
    "GroupedBlock": 4,
    "DiagonalBlock": 0,
    "DenseBlock": 1,
    "EigenBlock": 0,
    "LowRankBlock": 1,
}

Calls = list[tuple[int, ...]]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """The shapes of the matrices that were decomposed since the test began."""
    real, found = torch.linalg.eigh, []

    def counted(matrix: torch.Tensor) -> object:
        found.append(tuple(matrix.shape))
        return real(matrix)

    monkeypatch.setattr(torch.linalg, "eigh", counted)
    return found


def used(found: kfoc.Curvature, v: dict[str, torch.Tensor]) -> list[object]:
    """All that follows from eigendecompositions."""
    return [
        found.solve(v, DAMPING),
        found.logdet(2 * DAMPING, scale=2.0),
        found.damped(DAMPING).sqrt_matvec(v),
        found.sample(2, DAMPING),
        found.spectrum,
        found.damped(DAMPING, method="pi").inverse_diagonal(),
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_once_for_every_damping_and_use(kind: str, calls: Calls) -> None:
    found = curvature(block(kind))
    v = vector(found)
    used(found, v)
    assert len(calls) == COUNTS[kind]
    used(found.to("cpu"), v)
    assert len(calls) == COUNTS[kind]
    found.forget()
    used(found, v)
    assert len(calls) == 2 * COUNTS[kind]


@pytest.mark.parametrize("kind", [kind for kind, count in COUNTS.items() if count])
def test_what_is_computed_of_a_block_has_its_own(kind: str) -> None:
    found = curvature(block(kind))
    v = vector(found)
    found.solve(v, DAMPING)
    for other in (2 * found, found + found * 3.0, found.to(torch.float32).to(torch.float64)):
        matrix = dense(other) + DAMPING * torch.eye(len(dense(other)))
        expected = torch.linalg.solve(matrix, flat(found, v))
        torch.testing.assert_close(flat(found, other.solve(v, DAMPING)), expected, **CLOSE)


WRITES: dict[str, Callable[[torch.Tensor], object]] = {
    "in place": lambda tensor: tensor.mul_(2.0),
    "a view": lambda tensor: tensor.view(-1).mul_(2.0),
    "data": lambda tensor: tensor.data.mul_(2.0),
    "other data": lambda tensor: setattr(tensor, "data", 2.0 * tensor),
    "numpy": lambda tensor: tensor.numpy().__imul__(2.0),
    "memory": lambda tensor: tensor.untyped_storage().copy_((2.0 * tensor).untyped_storage()),
}


@pytest.mark.parametrize("copied", [False, True])
@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("kind", [kind for kind, count in COUNTS.items() if count])
def test_written_to_it_is_made_anew(
    kind: str, write: str, inference: bool, copied: bool, calls: Calls
) -> None:
    with torch.inference_mode(inference):
        found = curvature(block(kind))
        for tensor in found["0"].tensors():
            tensor.mul_(1.0)
    v = vector(found)
    found.solve(v, DAMPING)
    with torch.inference_mode(inference):
        WRITES[write](next(found["0"].tensors()))
    found = copy.deepcopy(found) if copied else found
    expected = torch.linalg.solve(
        dense(found) + DAMPING * torch.eye(len(dense(found))), flat(found, v)
    )
    torch.testing.assert_close(flat(found, found.solve(v, DAMPING)), expected, **CLOSE)
    assert len(calls) > COUNTS[kind]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_saved_on_request(kind: str, dtype: torch.dtype, tmp_path: Path, calls: Calls) -> None:
    pytest.importorskip("safetensors")
    found = curvature(block(kind), block(kind, 4, 5)).to(dtype)
    v = vector(found)
    found.save(tmp_path / "plain")
    assert not calls
    kfoc.Curvature.load(tmp_path / "plain").solve(v, DAMPING)
    assert len(calls) == 2 * COUNTS[kind]
    found.save(tmp_path / "factorised", factorised=True)
    sizes = [(tmp_path / name).stat().st_size for name in ("plain", "factorised")]
    assert (sizes[1] > sizes[0]) == bool(COUNTS[kind])
    expected = used(found, v)
    calls.clear()
    for mmap in (False, True):
        again = kfoc.Curvature.load(tmp_path / "factorised", mmap=mmap)
        for first, second in zip(used(again, v), expected, strict=True):
            if isinstance(first, dict):
                assert isinstance(second, dict)
                torch.testing.assert_close(first, second, rtol=1e-5, atol=1e-5)
        assert not calls
        again.forget()
        again.solve(v, DAMPING)
        assert len(calls) == 2 * COUNTS[kind]
        calls.clear()


def test_of_layers_that_cannot_be_factorised(tmp_path: Path) -> None:
    pytest.importorskip("safetensors")
    large = kfoc.LowRankBlock(psd(40)[None], psd(30)[None])
    with pytest.raises(ValueError, match="layer '0': a sum of 1 Kronecker products has no"):
        curvature(large).save(tmp_path / "c", factorised=True)
    assert not list(tmp_path.iterdir())


DAMAGES: dict[str, Callable[[dict[str, torch.Tensor]], object]] = {
    "of another matrix": lambda parts: parts["left_values"].mul_(1.5),
    "orthonormal": lambda parts: parts["right_vectors"].mul_(2.0),
    "4 numbers, found 7": lambda parts: parts.update(left_values=torch.ones(7)),
    "left_vectors must have the shape": lambda parts: parts.update(left_vectors=torch.eye(7)),
    "not finite": lambda parts: parts["right_values"].fill_(math.nan),
    "left_values": lambda parts: parts.pop("left_values"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_file_with_another_blocks_eigendecomposition(
    damage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("safetensors")
    found = curvature(block("KroneckerBlock"))
    real = storage.write_tensors

    def damaged(path: Path, key: str, text: str, tensors: dict[str, torch.Tensor]) -> None:
        own = {name: part.clone() for name, part in tensors.items() if "spectrum" not in name}
        parts = {name.split(".")[-1]: part.clone() for name, part in tensors.items()}
        DAMAGES[damage](parts)
        parts = {f"0.spectrum.{k}": v for k, v in parts.items() if f"0.spectrum.{k}" in tensors}
        real(path, key, text, own | parts)

    monkeypatch.setattr(storage, "write_tensors", damaged)
    found.save(tmp_path / "c", factorised=True)
    with pytest.raises(ValueError, match=f"is damaged.*{damage}"):
        kfoc.Curvature.load(tmp_path / "c")


def products() -> dict[str, tuple[kfoc.KroneckerBlock, str]]:
    """Blocks that are products with this damping."""
    return {
        "pi": (kfoc.KroneckerBlock(psd(4), psd(3)), "pi"),
        "pi, diagonal": (kfoc.KroneckerDiagonalBlock(psd(4), torch.rand(3)), "pi"),
        "one output": (kfoc.KroneckerBlock(psd(1), psd(5)), "exact"),
        "one input": (kfoc.KroneckerBlock(psd(5), psd(1)), "exact"),
        "one of each": (kfoc.KroneckerBlock(psd(1), psd(1)), "exact"),
        "one output, diagonal": (kfoc.KroneckerDiagonalBlock(psd(1), torch.rand(4)), "exact"),
        "one diagonal input": (kfoc.KroneckerDiagonalBlock(psd(4), torch.rand(1)), "exact"),
    }


@pytest.mark.parametrize("lead", [(), (3,), (2, 2)])
@pytest.mark.parametrize("case", products())
def test_products_are_solved_with_by_cholesky(
    case: str, lead: tuple[int, ...], calls: Calls
) -> None:
    found, method = products()[case]
    o, i = found.shape
    damping, scale = 0.3, 2.0
    damped = found.damped(Damping(damping, scale, method))
    assert isinstance(damped, DampedProduct)
    right = found.right if found.right.ndim == 2 else torch.diag(found.right)
    matrix = scale * torch.kron(found.left, right) + damping * torch.eye(o * i)
    if method == "pi":
        pi = math.sqrt((right.trace() / i) / (found.left.trace() / o))
        root, both = math.sqrt(damping), math.sqrt(scale)
        matrix = torch.kron(
            both * found.left + root / pi * torch.eye(o), both * right + root * pi * torch.eye(i)
        )
    v = torch.randn(*lead, o, i)
    inverse = torch.linalg.inv(matrix)
    torch.testing.assert_close(damped.power(v, -1).flatten(-2), v.flatten(-2) @ inverse, **CLOSE)
    torch.testing.assert_close(damped.power(v, 1).flatten(-2), v.flatten(-2) @ matrix, **CLOSE)
    assert damped.logdet() == pytest.approx(torch.logdet(matrix).item(), rel=1e-9, abs=1e-9)
    torch.testing.assert_close(damped.inverse_diagonal().flatten(), inverse.diagonal(), **CLOSE)
    assert (damped.dtype, damped.shape, damped.device) == (v.dtype, (o, i), v.device)
    assert not calls
    root = damped.power(damped.power(v, -0.5), -0.5)
    torch.testing.assert_close(root, damped.power(v, -1), **CLOSE)
    values = torch.linalg.eigvalsh(matrix)
    torch.testing.assert_close(damped.eigenvalues().sort().values, values, **CLOSE)
    assert calls
    calls.clear()
    other = found.damped(Damping(2 * damping, scale, method))  # what is there is used
    assert isinstance(other, DampedSpectrum)
    again = damped.redamped(Damping(2 * damping, scale, method))
    torch.testing.assert_close(again.power(v, -1), other.power(v, -1), **CLOSE)
    assert not calls


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("case", products())
def test_what_was_damped_before_a_write_is_not_mixed_with_what_is_there(
    case: str, write: str
) -> None:
    found, method = products()[case]
    damped = found.damped(Damping(0.3, 2.0, method))
    WRITES[write](found.right)
    v = torch.randn(found.shape)
    torch.testing.assert_close(damped.power(damped.power(v, -1), 1), v, **CLOSE)
    for root in (-0.5, 0.5):
        with pytest.raises(ValueError, match="written to since it was damped: damp it again"):
            damped.power(v, root)


def test_the_same_seed_gives_the_same_draws_whatever_was_kept() -> None:
    one = curvature(block("KroneckerBlock"))
    draws = flat(one, one.damped(0.1, method="pi").sample(3))
    one.solve(vector(one))
    torch.testing.assert_close(flat(one, one.damped(0.1, method="pi").sample(3)), draws, **CLOSE)


def test_where_cholesky_fails_eigenvalues_say_why() -> None:
    indefinite = kfoc.KroneckerBlock(torch.diag(torch.tensor([1.0, -0.5])), torch.eye(2))
    rotated = torch.tensor([[1.0, 2.0], [2.0, 1.0]])
    for bad in (indefinite, kfoc.KroneckerBlock(torch.eye(2), rotated)):
        with pytest.raises(ValueError, match=r"layer '0': .*not positive semi-definite"):
            curvature(bad).damped(0.01, method="pi")
    with pytest.raises(ValueError, match=r"layer '0': .*values that are not finite"):
        curvature(kfoc.KroneckerBlock(psd(2) * math.nan, psd(2))).damped(1.0, method="pi")
    above = psd(2)
    above[0, 1] = math.nan
    for bad in (kfoc.KroneckerBlock(above, psd(2)), kfoc.KroneckerBlock(psd(2), above)):
        with pytest.raises(ValueError, match=r"layer '0': .*values that are not finite"):
            curvature(bad).damped(1.0, method="pi")
    bad = kfoc.KroneckerDiagonalBlock(psd(2), torch.tensor([1.0, -1.0]))
    with pytest.raises(ValueError, match="layer '0': the right factor is not positive"):
        curvature(bad).damped(0.01, method="pi")
    singular = curvature(kfoc.KroneckerBlock(psd(1), psd(4, 2)))
    with pytest.raises(ValueError, match=r"layer '0': the block is singular .*damping must be pos"):
        singular.solve(vector(singular), 0.0)
    # Rounding makes a singular factor indefinite: eigenvalues are clamped, and solve.
    rows = torch.randn(3, 40)
    left = (rows.mT @ rows).float()
    found = curvature(kfoc.KroneckerBlock(left, left.clone()))
    assert isinstance(found.damped(1e-16, method="pi").blocks["0"], DampedSpectrum)
    v = {name: part.float() for name, part in vector(found).items()}
    assert flat(found, found.solve(v, 1e-16, method="pi")).isfinite().all()


def test_half_precision_is_factorised_in_single() -> None:
    found = curvature(block("KroneckerBlock")).to(torch.bfloat16)
    v = {name: part.float() for name, part in vector(found).items()}
    damped = found.damped(0.5, method="pi")
    assert isinstance(damped.blocks["0"], DampedProduct)
    expected = found.to(torch.float32).damped(0.5, method="pi").solve(v)
    torch.testing.assert_close(flat(found, damped.solve(v)), flat(found, expected))


def test_an_eigendecomposition_of_another_kind_or_shape_is_refused() -> None:
    for kind, other in [
        ("KroneckerBlock", block("DenseBlock")),
        ("DenseBlock", block("KroneckerBlock")),
        ("KroneckerBlock", block("KroneckerBlock", 2, 6)),
        ("KroneckerBlock", block("KroneckerDiagonalBlock")),
    ]:
        found = block(kind)
        assert isinstance(found, DecomposedBlock)
        assert isinstance(other, DecomposedBlock)
        with pytest.raises(ValueError, match=r"must|another matrix"):
            found.check_spectrum(other.spectrum())
