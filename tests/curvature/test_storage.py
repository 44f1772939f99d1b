"""Files: bit-identical, and every kind of damage is told."""

from __future__ import annotations

import json
import math
import pickle
import struct
import sys
import uuid
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import kfoc
from curvatures import block, curvature, psd
from kfoc.blocks import KINDS
from kfoc.curvature import file as storage
from kfoc.files import writing
from kfoc.files.tensors import checksum
from models import batches, convolutional, images

safetensors = pytest.importorskip("safetensors.torch")


def everything() -> kfoc.Curvature:
    return curvature(*[block(kind) for kind in KINDS])


def same(first: kfoc.Curvature, second: kfoc.Curvature) -> None:
    assert list(first) == list(second)
    for layer, one in first.items():
        other = second[layer]
        assert type(one) is type(other)
        assert one.report == other.report
        assert one.shape == other.shape
        pairs = list(zip(one.tensors(), other.tensors(), strict=True))
        assert pairs
        for a, b in pairs:
            assert a.dtype == b.dtype
            assert a.shape == b.shape
            assert torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))
    for name in ("num_samples", "layouts", "skipped", "estimator", "fisher", "seed"):
        assert getattr(first, name) == getattr(second, name)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "c.safetensors"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_round_trip(path: Path, dtype: torch.dtype) -> None:
    found = everything().to(dtype=dtype)
    found.save(path)
    again = kfoc.Curvature.load(str(path))
    same(found, again)
    assert [p.name for p in path.parent.iterdir()] == ["c.safetensors"]


def test_round_trip_of_a_fit(path: Path) -> None:
    model, (x, y) = convolutional(), images(10)
    found = kfoc.fit(model, batches(x, y, 5), probes=1, layers=["0", "3"], seed=3)
    found.save(path)
    again = kfoc.Curvature.load(path)
    assert again.estimator == repr(kfoc.KFOC())
    assert (again.fisher, again.seed, again.num_samples) == ("mc", 3, 10)
    assert again.skipped == found.skipped
    assert again.counts == found.counts
    assert again.coverage == found.coverage
    assert repr(again) == repr(found)  # reports with NaN do not compare equal
    v = {n: torch.randn(p.shape) for n, p in model.named_parameters() if n[0] in "03"}
    for name, tensor in found.solve(v).items():
        assert torch.equal(tensor, again.solve(v)[name])


def test_tensors_that_share_memory_or_are_not_contiguous(path: Path) -> None:
    factor = psd(3)
    found = curvature(kfoc.KroneckerBlock(factor.mT, factor), kfoc.KroneckerBlock(factor, factor))
    found.save(path)
    again = kfoc.Curvature.load(path)
    for layer in found:
        assert torch.equal(again[layer].left, found[layer].left)
        assert torch.equal(again[layer].right, found[layer].right)


def test_layer_names_of_any_kind(path: Path) -> None:
    found = everything()
    names = ["", "a.b", "ü/\n\0", "x" * 300, "0", "kfoc", "__metadata__"]
    renamed = kfoc.Curvature(
        dict(zip(names, found.blocks.values(), strict=True)),
        3,
        dict(zip(names, found.layouts.values(), strict=True)),
        {"ä": "ß"},
    )
    renamed.save(path)
    same(renamed, kfoc.Curvature.load(path))


def test_a_failed_save_leaves_what_was_there(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = everything()
    found.save(path)
    before = path.read_bytes()

    def failing(tensors: object, name: str, metadata: object) -> None:
        Path(name).write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(safetensors, "save_file", failing)
    with pytest.raises(OSError, match="no space left"):
        (2 * found).save(path)
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir()] == ["c.safetensors"]


def test_missing_files_and_folders(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="there is no file"):
        kfoc.Curvature.load(tmp_path / "nothing")
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        everything().save(tmp_path / "no folder" / "c.safetensors")


def test_without_safetensors(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(ImportError, match=r"pip install kfoc\[io\]"):
        everything().save(path)
    with pytest.raises(ImportError, match=r"pip install kfoc\[io\]"):
        kfoc.Curvature.load(path)


def test_truncated_anywhere(path: Path) -> None:
    everything().save(path)
    whole = path.read_bytes()
    for size in [0, 1, 7, 8, 9, 100, len(whole) // 2, len(whole) - 1]:
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match="damaged"):
            kfoc.Curvature.load(path)


def test_any_flipped_bit(path: Path) -> None:
    """In the size, the header and the numbers: at every so many bytes, one bit."""
    found = everything()
    found.save(path)
    whole = path.read_bytes()
    places = [*range(16), *range(16, len(whole), 41), len(whole) - 1]
    for place in places:
        for bit in (0, 6):
            changed = bytearray(whole)
            changed[place] ^= 1 << bit
            path.write_bytes(changed)
            with pytest.raises(ValueError, match=r"damaged|of another kind"):
                kfoc.Curvature.load(path)


def test_other_files(path: Path) -> None:
    safetensors.save_file({"weight": torch.ones(2)}, str(path), metadata={"format": "pt"})
    with pytest.raises(ValueError, match="a safetensors file of another kind"):
        kfoc.Curvature.load(path)
    safetensors.save_file({"weight": torch.ones(2)}, str(path))
    with pytest.raises(ValueError, match="a safetensors file of another kind"):
        kfoc.Curvature.load(path)
    path.write_bytes(b"not a file of tensors at all")
    with pytest.raises(ValueError, match="no safetensors file"):
        kfoc.Curvature.load(path)


class Bomb:
    def __reduce__(self) -> tuple:
        return (pytest.fail, ("a file was unpickled",))


def test_pickles_are_not_run(path: Path) -> None:
    path.write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(ValueError, match="no safetensors file"):
        kfoc.Curvature.load(path)
    torch.save({"a": torch.ones(2)}, path)
    with pytest.raises(ValueError, match="no safetensors file"):
        kfoc.Curvature.load(path)


def test_newer_versions(path: Path) -> None:
    everything().save(path)
    forged(path, lambda content: content.update(version=2))
    with pytest.raises(ValueError, match=r"has version 2 of the format, .* up to 1: update kfoc"):
        kfoc.Curvature.load(path)


CHANGES: dict[str, Callable[[dict, dict], object]] = {
    "a tensor is missing": lambda content, tensors: tensors.pop("0.left"),
    "a tensor is smaller": lambda content, tensors: tensors.update({"0.left": torch.ones(3, 3)}),
    "a tensor is float32": lambda content, t: t.update({"0.left": t["0.left"].float()}),
    "a tensor is another": lambda content, t: t.update({"0.left": t["0.left"] + 1e-9}),
    "the description is another": lambda content, tensors: content.update(num_samples=11),
}


@pytest.mark.parametrize("case", CHANGES)
def test_what_the_checksum_does_not_fit(path: Path, case: str) -> None:
    curvature(block("KroneckerBlock")).save(path)
    tensors, header = safetensors.load_file(str(path)), parted(path)[0]["__metadata__"]
    content = json.loads(header["kfoc"])
    CHANGES[case](content, tensors)
    header["kfoc"] = json.dumps(content)
    safetensors.save_file(tensors, str(path), metadata=header)
    with pytest.raises(ValueError, match="its checksum does not fit"):
        kfoc.Curvature.load(path)


# What each kind must be: entries of its tensors changed so that it is not, and what is then said.
UNSOUND: dict[str, dict[str, tuple[str, Callable[[torch.Tensor], torch.Tensor]]]] = {
    "KroneckerBlock": {
        "left": ("symmetric", lambda t: t + skew(t)),
        "right": ("symmetric", lambda t: t + skew(t)),
    },
    "KroneckerDiagonalBlock": {
        "left": ("symmetric", lambda t: t + skew(t)),
        "right": ("1 dimensions", lambda t: t.diag()),
    },
    "GroupedBlock": {"blocks.1.left": ("symmetric", lambda t: t + skew(t))},
    "DiagonalBlock": {"diagonal": ("2 dimensions", lambda t: t.flatten())},
    "DenseBlock": {"matrix": ("symmetric", lambda t: t + skew(t))},
    "EigenBlock": {
        "left_vectors": ("orthonormal", lambda t: 1.001 * t),
        "right_vectors": ("orthonormal", lambda t: t + skew(t)),
        "eigenvalues": ("2 dimensions", lambda t: t.flatten()),
    },
    "LowRankBlock": {
        "lefts": ("symmetric or antisymmetric", lambda t: t + skew(t)),
        "rights": ("symmetric or antisymmetric", lambda t: t + skew(t)),
    },
}
ANY = {
    "an integer": ("floating-point|must share dtype", lambda t: t.long()),
    "NaN": ("not finite", lambda t: t.clone().fill_(math.nan)),
    "infinity": ("not finite", lambda t: t.clone().fill_(math.inf)),
    "another shape": (
        "dimensions|do not fit|has a block|rows, for|orthonormal",
        lambda t: t[..., :-1, :-1],
    ),
    "more dimensions": ("dimensions", lambda t: t[None, None]),
}


def skew(tensor: torch.Tensor) -> torch.Tensor:
    """An antisymmetric matrix, small and yet beyond rounding, in the shape of a square one."""
    n = tensor.shape[-1]
    return 1e-9 * tensor.abs().max() * (torch.ones(n, n).triu(1) - torch.ones(n, n).tril(-1))


def cases() -> list[tuple[str, str, str]]:
    found = []
    for kind, parts in UNSOUND.items():
        for part in parts:
            found += [(kind, part, case) for case in ("own", "text", *ANY)]
    return [each for each in found if each[1:] != ("right", "another shape")]


@pytest.mark.parametrize(("kind", "part", "case"), cases())
def test_tensors_that_make_no_block(path: Path, kind: str, part: str, case: str) -> None:
    """With a checksum that fits: the error names the file, the layer and the tensor."""
    curvature(block("KroneckerBlock"), block(kind)).save(path)
    key = f"1.{part}"
    if case == "text":
        message = "must be a tensor, found 'x'"
        forged(path, lambda content: part_of(content, key).update(value="x"))
    else:
        message, change = UNSOUND[kind][part] if case == "own" else ANY[case]
        forged(path, lambda content: None, lambda tensors: tensors | {key: change(tensors[key])})
    with pytest.raises(ValueError, match=message) as error:
        kfoc.Curvature.load(path)
    assert repr(str(path)) in str(error.value)
    assert "layer '1'" in str(error.value)


def test_every_kind_says_when_it_is_unsound() -> None:
    assert UNSOUND.keys() == KINDS.keys(), "a new kind needs a check, and a line above"
    for kind, parts in UNSOUND.items():
        each = block(kind)
        each.check()
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            each.to(dtype).check()
        with pytest.raises(ValueError, match="finite"):
            (each.mapped(lambda t: t / 0)).check()
        assert all("." in part or part in each.parts() for part in parts)


def test_asymmetry_of_rounding_is_none(path: Path) -> None:
    rounded = torch.eye(4) + 1e-15 * torch.randn(4, 4)
    curvature(kfoc.KroneckerBlock(rounded, torch.eye(3))).save(path)
    assert torch.equal(kfoc.Curvature.load(path)["0"].left, rounded)


def test_what_could_not_be_loaded_is_not_saved(path: Path) -> None:
    with pytest.raises(ValueError, match=r"block of layer '0' .* left factor .* not finite"):
        curvature(kfoc.KroneckerBlock(torch.eye(4) * math.nan, torch.eye(3))).save(path)
    assert not path.exists()


def test_a_loaded_curvature_is_its_own(path: Path) -> None:
    """What becomes of the file afterwards is nothing to it."""
    found = everything()
    found.save(path)
    again = kfoc.Curvature.load(path)
    same(found, kfoc.Curvature.load(path, mmap=True))
    with open(path, "rb+") as file:
        file.write(bytes(path.stat().st_size))
    same(found, again)
    with open(path, "rb+") as file:  # a page that is gone ends the process that has it mapped
        file.truncate(0)
    same(found, again)


def test_a_planted_link_is_not_followed(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under the name of the temporary file, or of the file itself."""
    victim = path.with_name("victim")
    victim.write_text("mine")
    same_name = uuid.UUID(int=1)
    monkeypatch.setattr(writing.uuid, "uuid4", lambda: same_name)
    planted = path.with_name(f".{same_name.hex}.tmp")
    planted.symlink_to(victim)
    with pytest.raises(FileExistsError):
        everything().save(path)
    assert planted.is_symlink()
    planted.unlink()
    path.symlink_to(victim)
    everything().save(path)
    writing.write_text(path.with_name("text"), "new")
    assert not path.is_symlink()
    assert victim.read_text() == "mine"
    assert sorted(p.name for p in path.parent.iterdir()) == ["c.safetensors", "text", "victim"]


INCONSISTENT = {
    "block of another shape": lambda: kfoc.KroneckerBlock(torch.eye(3), torch.eye(3)),
    "factor that is not square": lambda: kfoc.KroneckerBlock(torch.ones(4, 2), torch.eye(3)),
    "matrix of another size": lambda: kfoc.DenseBlock(torch.eye(5), (4, 3)),
}


@pytest.mark.parametrize("case", INCONSISTENT)
def test_tensors_that_do_not_fit_each_other(
    path: Path, case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = curvature(block("KroneckerBlock"))
    bad = kfoc.Curvature({"0": INCONSISTENT[case]()}, 1, good.layouts, {})
    expected = r"has a block of shape|do not fit each other|must be square|rows, for"
    monkeypatch.setattr(storage, "_check", lambda layer, block: None)
    bad.save(path)
    monkeypatch.undo()
    with pytest.raises(ValueError, match=expected):
        kfoc.Curvature.load(path)


def parted(path: Path) -> tuple[dict, bytes]:
    """The header of a safetensors file, and what follows."""
    whole = path.read_bytes()
    stop = 8 + struct.unpack("<Q", whole[:8])[0]
    return json.loads(whole[8:stop]), whole[stop:]


HOSTILE_SIZES = [2**60, 2**63, 2**64 - 1, 2**31, 100_000_001, 0]


@pytest.mark.parametrize("size", HOSTILE_SIZES)
def test_sizes_that_no_file_has(path: Path, size: int) -> None:
    """A header that claims more bytes than there are: nothing is allocated for it."""
    everything().save(path)
    path.write_bytes(struct.pack("<Q", size) + path.read_bytes()[8:])
    with pytest.raises(ValueError, match="damaged"):
        kfoc.Curvature.load(path)


HOSTILE_TENSORS: list[dict] = [
    {"shape": [2**40, 2**20]},
    {"shape": [-1]},
    {"data_offsets": [0, 2**60]},
    {"data_offsets": [8, 0]},
    {"dtype": "F128"},
    {"dtype": "I64"},
]


@pytest.mark.parametrize("change", HOSTILE_TENSORS, ids=repr)
def test_tensors_that_are_not_what_the_header_says(path: Path, change: dict) -> None:
    everything().save(path)
    header, rest = parted(path)
    header["0.left"].update(change)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + rest)
    with pytest.raises(ValueError, match="damaged"):
        kfoc.Curvature.load(path)


HOSTILE_TEXTS = {
    "deep": "[" * 100_000,
    "no object": "NaN",
    "a long number": '{"version": ' + "9" * 5000 + "}",
    "empty": "",
}


@pytest.mark.parametrize("case", HOSTILE_TEXTS)
def test_descriptions_that_are_none(path: Path, case: str) -> None:
    everything().save(path)
    tensors, text = safetensors.load_file(str(path)), HOSTILE_TEXTS[case]
    header = {"kfoc": text, "checksum": checksum(text, tensors)}
    safetensors.save_file(tensors, str(path), metadata=header)
    with pytest.raises(ValueError, match="damaged: its description is no JSON"):
        kfoc.Curvature.load(path)


def forged(
    path: Path,
    change: Callable[[dict], object],
    changed: Callable[[dict], dict] = dict,
) -> None:
    """The file with its description or tensors changed, and a checksum that fits."""
    tensors = changed(safetensors.load_file(str(path)))
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    content = json.loads(parted(path)[0]["__metadata__"]["kfoc"])
    change(content)
    text = json.dumps(content)
    header = {"kfoc": text, "checksum": checksum(text, tensors)}
    safetensors.save_file(tensors, str(path), metadata=header)


def part_of(content: dict, key: str) -> dict:
    """The description of a tensor, with the key taken out of it."""
    number, *inside, last = key.split(".")
    entry = content["layers"][int(number)]["block"]
    for name, k in zip(inside[::2], inside[1::2], strict=True):
        entry = entry["parts"][name]["blocks"][int(k)]
    part = entry["parts"][last]
    assert part.pop("tensor") == key
    return part


def nested(content: dict) -> None:
    block = content["layers"][0]["block"]
    for _ in range(100):
        part = {"blocks": {"blocks": [block]}}
        block = {"kind": "GroupedBlock", "report": {}, "parts": part}
    content["layers"][0]["block"] = block


FORGED: dict[str, Callable[[dict], object]] = {
    "layers": lambda c: c.update(layers=5),
    "a layer": lambda c: c.update(layers=[1]),
    "a layer twice": lambda c: c["layers"].append(c["layers"][0]),
    "a name": lambda c: c["layers"][0].update(name=None),
    "kind": lambda c: c["layers"][0]["block"].update(kind=["x"]),
    "no parts": lambda c: c["layers"][0]["block"].update(parts={}),
    "nested": nested,
    "shapes": lambda c: c["layers"][0]["layout"].update(shapes=[]),
    "huge shapes": lambda c: c["layers"][0]["layout"].update(shapes=[[10**30, 3]]),
    "a report's number": lambda c: c["layers"][0]["block"]["report"].update(relative_error="1"),
    "a report's truth": lambda c: c["layers"][0]["block"]["report"].update(converged="no"),
    "names": lambda c: c["layers"][0]["layout"].update(names=[1, 2]),
    "a size as text": lambda c: c["layers"][0]["layout"].update(shapes=[["4", 2], [4]]),
    "groups": lambda c: c["layers"][0]["layout"].update(groups="1"),
    "a name for none": lambda c: c["layers"][0]["layout"]["names"].append("more"),
    "report": lambda c: c["layers"][0]["block"].update(report={"evil": 1}),
    "version": lambda c: c.update(version=True),
    "negative version": lambda c: c.update(version=-1),
    "samples": lambda c: c.update(num_samples=-3),
    "samples as truth": lambda c: c.update(num_samples=True),
    "seed": lambda c: c.update(seed="1"),
    "skipped": lambda c: c.update(skipped={"a": [1]}),
    "counts": lambda c: c.update(counts={"a": 1}),
}


@pytest.mark.parametrize("case", FORGED)
def test_forged_descriptions(path: Path, case: str) -> None:
    """Even with the right checksum, what does not make a curvature is refused, and named."""
    everything().save(path)
    forged(path, FORGED[case])
    with pytest.raises(ValueError, match="damaged"):
        kfoc.Curvature.load(path)


def test_a_folder_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="there is no file"):
        kfoc.Curvature.load(tmp_path)
