"""Elastic weight consolidation: learning tasks one after another with what the last ones need."""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from kfoc.ambient import Plain
from kfoc.curvature import Curvature
from kfoc.storage import safetensors_torch
from kfoc.vectors import Vector

ANCHORS = ("latest", "each")
_INDEX = "consolidation.json"


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

    Parameters that no block covers (`curvature.skipped`) are not held.

    Args:
        strength: factor of the penalty. It is a sum over the samples of the earlier tasks: beside
            a loss that is a mean over N samples, 1/N weighs every sample alike, old or new.
        anchors: "latest": one quadratic, around the parameters after the latest task, with the
            weighted sum of all curvatures (Ritter et al.; memory for one curvature); or "each":
            one quadratic per task, around that task's own parameters (Kirkpatrick et al.), which
            also takes eigen-corrected curvatures, whose sums have no common eigenbasis.
    """

    def __init__(self, strength: float = 1.0, anchors: str = "latest") -> None:
        if anchors not in ANCHORS:
            raise ValueError(f"anchors must be one of {', '.join(ANCHORS)}, found {anchors!r}")
        if not 0 <= strength < math.inf:
            raise ValueError(f"strength must be finite and not negative, found {strength}")
        self.strength = strength
        self.anchors = anchors
        self.tasks: list[Task] = []

    def add(self, model: nn.Module, curvature: Curvature) -> None:
        """Note that the model, as it is now, has learnt a task with this curvature.

        Raises:
            ValueError: parameters of the curvature that the model lacks, or, for
                `anchors="latest"`, a curvature that does not add up with those before.
        """
        parameters = _parameters(model, curvature)
        anchor = {name: value.detach().clone() for name, value in parameters.items()}
        if self.anchors == "latest" and self.tasks:
            curvature = self.tasks[-1].curvature + curvature
            self.tasks.clear()
        self.tasks.append(Task(anchor, curvature))

    def penalty(self, model: nn.Module) -> Tensor:
        """`strength / 2 * sum (theta - anchor)^T num_samples F (theta - anchor)`, a scalar.

        The sum is over the anchors; the result is differentiable by the model's parameters, and a
        zero before the first task.
        """
        total = next(model.parameters()).new_zeros(())
        for task in self.tasks:
            parameters = _parameters(model, task.curvature)
            total = total + 0.5 * self.strength * task.penalty(parameters)
        return total

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write everything into a folder, made where it is not there (`pip install kfoc[io]`)."""
        torch_format = safetensors_torch()
        target = Path(folder)
        target.mkdir(parents=True, exist_ok=True)
        # Last comes what makes the folder readable: a save that is cut off cannot be mistaken.
        (target / _INDEX).unlink(missing_ok=True)
        for number, task in enumerate(self.tasks):
            task.curvature.save(target / f"{number}.curvature.safetensors")
            anchor = {name: value.contiguous() for name, value in task.anchor.items()}
            torch_format.save_file(anchor, str(target / f"{number}.anchor.safetensors"))
        index = {"strength": self.strength, "anchors": self.anchors, "tasks": len(self.tasks)}
        (target / _INDEX).write_text(json.dumps(index))

    @classmethod
    def load(
        cls, folder: str | os.PathLike[str], device: torch.device | str = "cpu"
    ) -> Consolidation:
        """Read what `save` wrote. Nothing is unpickled.

        Raises:
            FileNotFoundError: the folder, or a file in it, is not there.
            ValueError: a file that is damaged.
        """
        torch_format = safetensors_torch()
        source = Path(folder)
        index = json.loads((source / _INDEX).read_text())
        found = cls(index["strength"], index["anchors"])
        for number in range(index["tasks"]):
            curvature = Curvature.load(source / f"{number}.curvature.safetensors", device)
            anchor = torch_format.load_file(
                str(source / f"{number}.anchor.safetensors"), device=str(device)
            )
            found.tasks.append(Task(anchor, curvature))
        return found


def _parameters(model: nn.Module, curvature: Curvature) -> dict[str, Tensor]:
    """The model's parameters that the curvature covers."""
    known = dict(model.named_parameters())
    names = [name for names in curvature.parameters.values() for name in names]
    missing = [name for name in names if name not in known]
    if missing:
        raise ValueError(f"the curvature covers {missing}, which the model does not have")
    return {name: known[name] for name in names}
