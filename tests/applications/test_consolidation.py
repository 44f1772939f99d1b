"""The penalty of elastic weight consolidation against dense quadratics."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import kfoc
from kfoc.files import writing
from models import Data, batches, convolutional, images

ESTIMATORS = {
    "K-FOC": kfoc.KFOC(),
    "K-FAC": kfoc.KFAC(),
    "diagonal": kfoc.Diagonal(),
    "EK-FOC": kfoc.EigenCorrected(),
}
LAYERS = ("0", "3", "5")


def flat(model: nn.Module, what: str = "data") -> Tensor:
    """All parameters, or their gradients, layer by layer as [W | b]."""
    parts = []
    for layer in LAYERS:
        module = model.get_submodule(layer)
        pair = [module.weight, module.bias]
        pair = [p.grad for p in pair] if what == "grad" else [p.detach() for p in pair]
        parts.append(torch.cat([pair[0].flatten(1), pair[1][:, None]], 1).flatten().clone())
    return torch.cat(parts)


def dense(curvature: kfoc.Curvature) -> Tensor:
    return torch.block_diag(*[block.to_dense() for block in curvature.values()])


def move(model: nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))


def task(count: int) -> Data:
    return batches(*images(count), 5)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_each_task_has_its_own_quadratic(name: str) -> None:
    model = convolutional()
    consolidation = kfoc.Consolidation(strength=0.3, anchors="each")
    terms = []
    for count in (10, 20):
        curvature = kfoc.fit(model, task(count), estimator=ESTIMATORS[name])
        consolidation.add(model, curvature)
        terms.append((flat(model), count * dense(curvature)))
        move(model)
    penalty = consolidation.penalty(model)
    penalty.backward()
    apart = [flat(model) - anchor for anchor, _ in terms]
    expected = sum(0.15 * d @ f @ d for d, (_, f) in zip(apart, terms, strict=True))
    torch.testing.assert_close(penalty.detach(), expected, rtol=1e-9, atol=0.0)
    gradient = sum(0.3 * f @ d for d, (_, f) in zip(apart, terms, strict=True))
    torch.testing.assert_close(flat(model, "grad"), gradient, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("name", ["K-FOC", "K-FAC", "diagonal"])
def test_the_latest_anchor_has_the_sum_of_the_curvatures(name: str) -> None:
    model = convolutional()
    consolidation = kfoc.Consolidation(anchors="latest")
    curvatures = []
    for count in (10, 20):
        move(model)
        curvatures.append(kfoc.fit(model, task(count), estimator=ESTIMATORS[name]))
        consolidation.add(model, curvatures[-1])
    anchor = flat(model)
    move(model)
    penalty = consolidation.penalty(model)
    penalty.backward()
    both = 30 * dense(curvatures[0] + curvatures[1])
    if name == "diagonal":  # sums of diagonals are exact
        both = 10 * dense(curvatures[0]) + 20 * dense(curvatures[1])
    apart = flat(model) - anchor
    torch.testing.assert_close(penalty.detach(), 0.5 * apart @ both @ apart, rtol=1e-9, atol=0.0)
    torch.testing.assert_close(flat(model, "grad"), both @ apart, rtol=1e-8, atol=1e-12)


def test_there_is_no_penalty_before_the_first_task_nor_at_an_anchor() -> None:
    model = convolutional()
    consolidation = kfoc.Consolidation()
    assert consolidation.penalty(model).item() == 0
    consolidation.add(model, kfoc.fit(model, task(10)))
    assert consolidation.penalty(model).item() == 0
    move(model)
    assert consolidation.penalty(model).item() > 0


@pytest.mark.parametrize("anchors", ["latest", "each"])
def test_saved_and_loaded(anchors: str, tmp_path: Path) -> None:
    model = convolutional()
    consolidation = kfoc.Consolidation(0.7, anchors)
    for _ in range(2):
        consolidation.add(model, kfoc.fit(model, task(10)))
        move(model)
    consolidation.save(tmp_path / "tasks")
    consolidation.save(tmp_path / "tasks")
    again = kfoc.Consolidation.load(tmp_path / "tasks")
    assert again.anchors == anchors
    assert torch.equal(again.penalty(model), consolidation.penalty(model))
    again.add(model, kfoc.fit(model, task(10)))
    next((tmp_path / "tasks").glob("*-0.anchor.safetensors")).unlink()
    with pytest.raises(FileNotFoundError, match=r"lacks .*anchor"):
        kfoc.Consolidation.load(tmp_path / "tasks")


def taught() -> kfoc.Consolidation:
    model = convolutional()
    found = kfoc.Consolidation(0.7, "each")
    for _ in range(2):
        found.add(model, kfoc.fit(model, task(5), estimator=kfoc.KFAC()))
        move(model)
    return found


@pytest.mark.parametrize("writes", range(5))
def test_a_failed_save_leaves_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, writes: int
) -> None:
    """The disk is full at any of the five files: two curvatures, two anchors, the index."""
    model, older, newer = convolutional(), taught(), taught()
    older.save(tmp_path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    done = 0

    def full(descriptor: int) -> None:
        nonlocal done
        if done == 2 * writes:  # of a file and of its folder
            raise OSError("no space left on device")
        done += 1

    monkeypatch.setattr(writing.os, "fsync", full)
    with pytest.raises(OSError, match="no space left"):
        newer.save(tmp_path)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before
    monkeypatch.undo()
    assert torch.equal(kfoc.Consolidation.load(tmp_path).penalty(model), older.penalty(model))
    newer.save(tmp_path)
    assert len(list(tmp_path.iterdir())) == len(before)
    assert torch.equal(kfoc.Consolidation.load(tmp_path).penalty(model), newer.penalty(model))


def test_a_save_that_was_killed_leaves_the_one_before(tmp_path: Path) -> None:
    """Whatever lies beside the files of the index is not looked at, and goes with the next save."""
    taught().save(tmp_path)
    first = next(tmp_path.glob("*-0.curvature.safetensors"))
    (tmp_path / "task-0-0.curvature.safetensors").write_bytes(first.read_bytes()[:50])
    kfoc.Consolidation.load(tmp_path)
    taught().save(tmp_path)
    assert not (tmp_path / "task-0-0.curvature.safetensors").exists()


def test_any_damaged_file_is_told(tmp_path: Path) -> None:
    taught().save(tmp_path)
    for file in tmp_path.iterdir():
        whole = file.read_bytes()
        for place in (len(whole) // 3, len(whole) // 2, len(whole) - 5):
            changed = bytearray(whole)
            changed[place] ^= 1
            file.write_bytes(changed)
            with pytest.raises(ValueError, match=r"damaged|of another save|not of a curvature"):
                kfoc.Consolidation.load(tmp_path)
        file.write_bytes(whole)
    kfoc.Consolidation.load(tmp_path)


@pytest.mark.parametrize("what", ["curvature", "anchor"])
def test_files_of_two_saves_are_not_mixed(tmp_path: Path, what: str) -> None:
    for name in ("one", "two"):
        taught().save(tmp_path / name)
    one, two = (next((tmp_path / n).glob(f"*-1.{what}.safetensors")) for n in ("one", "two"))
    one.write_bytes(two.read_bytes())
    with pytest.raises(ValueError, match=f"{what}.safetensors' is of another save"):
        kfoc.Consolidation.load(tmp_path / "one")


def test_what_is_loaded_stays_when_the_files_change(tmp_path: Path) -> None:
    model = convolutional()
    taught().save(tmp_path)
    loaded = kfoc.Consolidation.load(tmp_path)
    before = loaded.penalty(model)
    for file in tmp_path.iterdir():
        with open(file, "rb+") as opened:
            opened.write(bytes(file.stat().st_size))
    assert torch.equal(loaded.penalty(model), before)


def test_a_head_that_has_grown() -> None:
    """Or was replaced by one of another size: named, with both shapes."""
    model, consolidation = convolutional(), taught()
    head = model.get_submodule("5")
    shapes = tuple(head.weight.shape), (2 * head.out_features, head.in_features)
    curvature = kfoc.fit(model, task(5))
    model[5] = nn.Linear(head.in_features, 2 * head.out_features)
    for call in (
        lambda: consolidation.penalty(model),
        lambda: kfoc.Consolidation().add(model, curvature),
    ):
        with pytest.raises(ValueError, match=r"'5\.weight' .* more outputs in grown") as error:
            call()
        assert all(str(shape) in str(error.value) for shape in shapes)


class Heads(nn.Module):
    """A head for each task, on one body; inputs say which."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(4, 5)
        self.heads = nn.ModuleDict({"a": nn.Linear(5, 2), "b": nn.Linear(5, 3)})
        self.task = "a"

    def forward(self, x: Tensor) -> Tensor:
        return self.heads[self.task](torch.tanh(self.body(x)))


def test_heads_of_several_tasks_are_held_each_from_its_own(tmp_path: Path) -> None:
    model = Heads()
    consolidation = kfoc.Consolidation(strength=0.3)
    expected: dict[str, Tensor | float] = {}
    fishers = {}
    for model.task, count in (("a", 8), ("b", 12), ("a", 10)):
        x = torch.randn(count, 4)
        found = kfoc.fit(model, [(x, None)], fisher="exact", estimator=kfoc.BlockDiagonal())
        assert set(found) == {"body", f"heads.{model.task}"}
        for layer, block in found.items():
            expected[layer] = expected.get(layer, 0.0) + count * block.to_dense()
        consolidation.add(model, found)
        fishers[model.task] = found
        anchor = {name: p.detach().clone() for name, p in model.named_parameters()}
        assert consolidation.penalty(model) == 0
        move(model)
        total = torch.zeros(())
        for layer, matrix in expected.items():
            module = model.get_submodule(layer)
            pair = module.weight - anchor[f"{layer}.weight"], module.bias - anchor[f"{layer}.bias"]
            apart = torch.cat([pair[0], pair[1][:, None]], 1).flatten()
            total = total + 0.15 * apart @ matrix @ apart
        torch.testing.assert_close(consolidation.penalty(model), total)
    (kept,) = consolidation.tasks
    assert kept.curvature.num_samples == 30
    assert not kept.curvature.skipped
    consolidation.save(tmp_path)
    loaded = kfoc.Consolidation.load(tmp_path)
    torch.testing.assert_close(loaded.penalty(model), total)
    # A layer that is left out for another reason is no head of another task.
    part = kfoc.fit(
        model, [(x, None)], fisher="exact", estimator=kfoc.BlockDiagonal(), layers="body"
    )
    with pytest.raises(
        ValueError, match=r"layer 'heads.a' .* after another \(it was not asked for"
    ):
        consolidation.add(model, part)
    model.heads["c"] = nn.Linear(5, 2)  # and one that was not there is one
    model.task = "c"
    consolidation.add(model, kfoc.fit(model, [(x, None)], estimator=kfoc.BlockDiagonal()))
    assert "heads.c" in consolidation.tasks[-1].curvature
    model.body.requires_grad_(False)
    frozen = kfoc.fit(model, [(x, None)], fisher="exact", estimator=kfoc.BlockDiagonal())
    with pytest.raises(
        ValueError, match=r"layer 'body' .* none after another \(its parameters are"
    ):
        consolidation.add(model, frozen)


@pytest.mark.parametrize("anchors", ["latest", "each"])
@pytest.mark.parametrize("name", ["exact", "diagonal", "K-FAC"])
def test_heads_that_grow_by_name(name: str, anchors: str, tmp_path: Path) -> None:
    """What there was is held, in its place among the first outputs, and the new from then on."""
    estimator = {"exact": kfoc.BlockDiagonal(), **ESTIMATORS}[name]
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))
    consolidation = kfoc.Consolidation(0.3, anchors, grown=["2"])
    held: list[tuple[int, Tensor, Tensor]] = []
    for classes in (2, 2, 5):
        if classes > model[2].out_features:
            old, model[2] = model[2], nn.Linear(3, classes)
            with torch.no_grad():
                model[2].weight[:2], model[2].bias[:2] = old.weight + 0.1, old.bias
            assert consolidation.penalty(model) > 0
        found = kfoc.fit(model, [(torch.randn(10, 4), None)], fisher="exact", estimator=estimator)
        matrix = torch.cat([model[2].weight, model[2].bias[:, None]], 1).detach()
        held.append((classes, 10 * found["2"].to_dense(), matrix.clone()))
        consolidation.add(model, found)
        body = [p.detach().clone() for p in model[0].parameters()]
        move(model)
    with torch.no_grad():
        for parameter, value in zip(model[0].parameters(), body, strict=True):
            parameter.copy_(value)
    consolidation.save(tmp_path)
    loaded = kfoc.Consolidation.load(tmp_path)
    assert loaded.grown == ("2",)
    assert torch.equal(loaded.penalty(model), consolidation.penalty(model))
    if name == "K-FAC" or anchors == "each":  # merged to a product; or the body's terms too
        return
    now = torch.cat([model[2].weight, model[2].bias[:, None]], 1)
    expected = torch.zeros(())
    for classes, fisher, _ in held:
        apart = (now - held[-1][2])[:classes].flatten()
        expected = expected + 0.15 * apart @ fisher @ apart
    torch.testing.assert_close(consolidation.penalty(model), expected)


def test_blocks_that_cannot_grow_are_named() -> None:
    model, consolidation = convolutional(), kfoc.Consolidation(grown="5")
    consolidation.add(model, kfoc.fit(model, task(10), estimator=ESTIMATORS["EK-FOC"]))
    model[5] = nn.Linear(model[5].in_features, 2 * model[5].out_features)
    with pytest.raises(ValueError, match="layer '5': its EigenBlock cannot be given more outputs"):
        consolidation.add(model, kfoc.fit(model, task(10)))
    assert len(consolidation.tasks) == 1


def test_a_penalty_that_is_not_finite() -> None:
    model, consolidation = convolutional(), taught()
    with torch.no_grad():
        model[3].bias[0] = torch.nan
    with pytest.raises(ValueError, match=r"penalty is nan: the parameters \['3\.bias'\] have"):
        consolidation.penalty(model)


def test_errors_name_what_to_do() -> None:
    model = convolutional()
    with pytest.raises(ValueError, match="anchors must be one of latest, each"):
        kfoc.Consolidation(anchors="first")
    with pytest.raises(ValueError, match="strength"):
        kfoc.Consolidation(-1.0)
    curvature = kfoc.fit(model, task(10))
    with pytest.raises(ValueError, match="does not have"):
        kfoc.Consolidation().add(nn.Linear(3, 2), curvature)
    consolidation = kfoc.Consolidation()
    for _ in range(2):
        move(model)
        eigen = kfoc.fit(model, task(10), estimator=kfoc.EigenCorrected())
        if consolidation.tasks:
            with pytest.raises(ValueError, match="different eigenbases"):
                consolidation.add(model, eigen)
            assert len(consolidation.tasks) == 1
        else:
            consolidation.add(model, eigen)
