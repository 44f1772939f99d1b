"""Elastic weight consolidation: learning tasks one after another with what the last ones need."""

from __future__ import annotations

import math
import os
import uuid
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from kfoc.blocks import Block, DenseBlock, DiagonalBlock, KroneckerBlock, Report
from kfoc.common.ambient import Plain
from kfoc.common.arguments import one_of
from kfoc.curvature.curvature import Curvature, of_layers
from kfoc.errors import problem
from kfoc.files.index import read_index, saving, write_index
from kfoc.files.tensors import read_tensors, write_tensors
from kfoc.parameters.coverage import NOT_CALLED
from kfoc.parameters.layout import covered
from kfoc.parameters.vectors import Vector

ANCHORS = ("latest", "each")
_INDEX = "consolidation.json"
_ANCHOR = "kfoc anchor"


@dataclass(frozen=True)
class Task:
    """A quadratic around the parameters at which a task (or several) had been learnt.

    Attributes:
        anchor: parameter name -> its value then, of the parameters that the curvature covers.
        curvature: the mean Fisher, with the number of samples it is over.
    """

    anchor: dict[str, Tensor]
    curvature: Curvature

    def penalty(self, parameters: Vector) -> Tensor:
        """`(theta - anchor)^T num_samples F (theta - anchor)`."""
        apart = {name: parameters[name] - value for name, value in self.anchor.items()}
        return self.curvature.num_samples * self.curvature.quadratic_form(apart)


class Consolidation(Plain):
    """A quadratic penalty that holds what earlier tasks have taught (Kirkpatrick et al. 2017).

    With Kronecker-factored blocks this is the online Laplace approximation of Ritter, Botev &
    Barber (2018): the loss of earlier tasks is replaced by its second-order expansion, with the
    Fisher in place of the Hessian.

        consolidation = kfoc.Consolidation(strength=1 / num_samples_of_the_new_task)
        for task in tasks:
            ...  # train on task.loss + consolidation.penalty(model)
            consolidation.add(model, kfoc.fit(model, task.data))

    Parameters that no block covers (`curvature.skipped`) are not held. Heads of several tasks in
    one model are each held from the task on that called them.

    Args:
        strength: factor of the penalty. It is a sum over the samples of the earlier tasks: beside
            a loss that is a mean over N samples, 1/N weighs every sample alike, old or new.
        anchors: "latest": one quadratic, around the parameters after the latest task, with the
            weighted sum of all curvatures (Ritter et al.; memory for one curvature); or "each":
            one quadratic per task, around that task's own parameters (Kirkpatrick et al.), which
            also takes eigen-corrected curvatures, whose sums have no common eigenbasis.
        grown: names of layers that may get more outputs between tasks, behind those that there
            are, as a head with new classes does: these are held, and the new ones from then on.
    """

    def __init__(
        self, strength: float = 1.0, anchors: str = "latest", grown: Iterable[str] = ()
    ) -> None:
        one_of("anchors", anchors, ANCHORS)
        if not 0 <= strength < math.inf:
            raise ValueError(f"strength must be finite and not negative, found {strength}")
        self.strength = strength
        self.anchors = anchors
        self.grown = (grown,) if isinstance(grown, str) else tuple(grown)
        self.tasks: list[Task] = []

    def add(self, model: nn.Module, curvature: Curvature) -> None:
        """Note that the model, as it is now, has learnt a task with this curvature.

        Raises:
            ValueError: parameters of the curvature that the model lacks or has in another shape,
                or, for `anchors="latest"`, a curvature that does not add up with those before.
        """
        parameters, kept = _parameters(model, curvature, ()), self.tasks
        if self.anchors == "latest" and self.tasks:
            old = _widened(self.tasks[-1].curvature, curvature, self.grown)
            curvature, kept = _joined(old, curvature), []
            parameters = _parameters(model, curvature, ())
        anchor = {name: value.detach().clone() for name, value in parameters.items()}
        self.tasks = [*kept, Task(anchor, curvature)]

    def penalty(self, model: nn.Module) -> Tensor:
        """`strength / 2 * sum (theta - anchor)^T num_samples F (theta - anchor)`, a scalar.

        The sum is over the anchors; the result is differentiable by the model's parameters, and a
        zero before the first task.

        Raises:
            ValueError: parameters that are missing, of another shape, or not finite.
        """
        total = next(model.parameters()).new_zeros(())
        for task in self.tasks:
            parameters = _parameters(model, task.curvature, self.grown)
            total = total + 0.5 * self.strength * task.penalty(parameters)
            if not total.detach().isfinite():
                broken = [name for name, p in parameters.items() if not p.detach().isfinite().all()]
                what = f"the parameters {broken} have" if broken else "the curvature or anchor has"
                raise ValueError(
                    f"the penalty is {total.item()}: {what} values that are not finite"
                )
        return total

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write everything into a folder, made where it is not there (`pip install kfoc[io]`).

        A save over an older one takes its place when it is complete; until then that one stays.
        """
        target = Path(folder)
        target.mkdir(parents=True, exist_ok=True)
        stem, files = f"task-{uuid.uuid4().hex}", list[str]()
        with saving(target / _INDEX, files):
            for number, task in enumerate(self.tasks):
                files += [f"{stem}-{number}.{what}.safetensors" for what in ("curvature", "anchor")]
                task.curvature.save(target / files[-2])
                write_tensors(target / files[-1], _ANCHOR, "", task.anchor)
            index = {"strength": self.strength, "anchors": self.anchors, "grown": [*self.grown]}
            write_index(target / _INDEX, files, index, "task-*.safetensors")

    @classmethod
    def load(
        cls, folder: str | os.PathLike[str], device: torch.device | str = "cpu"
    ) -> Consolidation:
        """Read what `save` wrote, into memory. Nothing is unpickled.

        Raises:
            FileNotFoundError: the folder, or a file in it, is not there.
            ValueError: a file that is damaged, or of another save.
        """
        source = Path(folder)
        index = read_index(source / _INDEX)
        found = cls(index["strength"], index["anchors"], index.get("grown", ()))
        names = list(index["files"])
        for first, second in zip(names[::2], names[1::2], strict=True):
            curvature = Curvature.load(source / first, device)
            found.tasks.append(Task(_anchor(source / second, curvature, device), curvature))
        return found


def _joined(old: Curvature, new: Curvature) -> Curvature:
    """The mean Fisher over the samples of both, zero where a layer was not called, or not there.

    Raises:
        ValueError: layers that are in one of them alone for another reason, or that do not add up.
    """
    shared = [layer for layer in old if layer in new]
    for one, other in ((old, new), (new, old)):
        for layer in one.layers:
            reason = other.skipped.get(layer, "it was not asked for")
            there = any(name in other.counts for name in one.parameters[layer])
            if layer not in other.blocks and there and reason != NOT_CALLED:
                raise ValueError(
                    f"layer {layer!r} has a block after one task and none after another "
                    f"({reason}): fit the same layers for all tasks, by layers=..."
                )
    if len(shared) == len(old) == len(new):
        return old + new
    total = old.num_samples + new.num_samples
    parts = [of_layers(old, shared) + of_layers(new, shared)] if shared else []
    for one, other in ((old, new), (new, old)):
        alone = [layer for layer in one if layer not in other]
        parts.append(of_layers(one, alone) * (one.num_samples / total))
    skipped = {
        k: v for k, v in (old.skipped | new.skipped).items() if k not in old and k not in new
    }
    return replace(
        new,
        blocks={layer: block for part in parts for layer, block in part.items()},
        layouts={layer: layout for part in parts for layer, layout in part.layouts.items()},
        num_samples=total,
        skipped=skipped,
    )


def _anchor(path: Path, curvature: Curvature, device: torch.device | str) -> dict[str, Tensor]:
    _, tensors = read_tensors(path, _ANCHOR)
    shapes = covered(curvature.layouts)
    if shapes != {name: tuple(tensor.shape) for name, tensor in tensors.items()}:
        raise ValueError(f"{str(path)!r} has no parameters of the curvature beside it")
    return {name: tensors[name].to(device) for name in shapes}


def _widened(old: Curvature, new: Curvature, grown: tuple[str, ...]) -> Curvature:
    """With zeros for the outputs that layers have got since.

    Raises:
        ValueError: a kind of block that zeros cannot be put behind.
    """
    blocks, layouts = dict(old.blocks), dict(old.layouts)
    for layer in [layer for layer in grown if layer in old and layer in new]:
        more = new.layouts[layer].shape[0] - old.layouts[layer].shape[0]
        if more > 0 and old.layouts[layer].kind == new.layouts[layer].kind == "rows":
            blocks[layer] = _with_outputs(layer, old[layer], more)
            layouts[layer] = new.layouts[layer]
    return replace(old, blocks=blocks, layouts=layouts)


def _with_outputs(layer: str, block: Block, more: int) -> Block:
    """The block of a layer with so many outputs more, which it says nothing of."""
    report = Report()  # its error was that of another matrix
    if type(block) is KroneckerBlock:
        return replace(block, left=pad(block.left, (0, more, 0, more)), report=report)
    if isinstance(block, DiagonalBlock):
        return replace(block, diagonal=pad(block.diagonal, (0, 0, 0, more)), report=report)
    if isinstance(block, DenseBlock):
        o, i = block.shape
        matrix = pad(block.matrix, (0, more * i, 0, more * i))
        return replace(block, matrix=matrix, weight_shape=(o + more, i), report=report)
    raise problem(
        layer,
        f"its {type(block).__name__} cannot be given more outputs: fit kfoc.KFOC(), kfoc.KFAC() or "
        'kfoc.Diagonal(), or take anchors="each"',
    )


def _parameters(
    model: nn.Module, curvature: Curvature, grown: tuple[str, ...]
) -> dict[str, Tensor]:
    """The model's parameters that the curvature covers; of layers that have grown, the first."""
    if not isinstance(model, nn.Module):
        raise ValueError(f"model must be a torch.nn.Module, found a {type(model).__name__}")
    known, shapes = dict(model.named_parameters()), covered(curvature.layouts)
    missing = [name for name in shapes if name not in known]
    if missing:
        raise ValueError(f"the curvature covers {missing}, which the model does not have")
    may_grow = {name for layer in grown for name in curvature.parameters.get(layer, ())}
    for name, shape in shapes.items():
        found = tuple(known[name].shape)
        if name in may_grow and found[0] > shape[0] and found[1:] == shape[1:]:
            known[name] = known[name][: shape[0]]  # type: ignore[assignment]
        elif found != shape:
            raise ValueError(
                f"the parameter {name!r} has the shape {found}, and the "
                f"curvature is about one of {shape}: name layers that get more outputs in grown, "
                "leave others out of what is held (kfoc.fit(layers=...)), or put new outputs into "
                "a layer of their own"
            )
    return {name: known[name] for name in shapes}
