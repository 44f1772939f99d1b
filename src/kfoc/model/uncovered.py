"""Per-sample gradients of parameters that no layer rule covers.

By `torch.func`, sample by sample in one vectorised pass, or one sample after the other where a
model does not go through it. Both run samples by themselves, so both are held against the batch's
own gradient; where they do not add up to it (samples that depend on each other, dropout), one
backward pass a sample through the batch's graph gives the derivatives of that sample's outputs.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kfoc.layers.rule import Unsupported
from kfoc.linalg.scaling import wide
from kfoc.model.batches import Predict
from kfoc.model.functional import Forward, count_samples
from kfoc.model.sample_gradients import gradients
from kfoc.model.trace import coarsest, tolerance

# A block's per-sample gradients of one batch hold at most so many numbers (1 GiB in float32).
NUMBERS_LIMIT = 2**28

Parameters = Mapping[str, Tensor]
UNSUMMED = (
    "the per-sample gradients of {} do not add up to its gradient (does a hook or a custom "
    "function change it?)"
)


@dataclass
class Batch:
    """One batch, of which per-sample gradients are asked for.

    Attributes:
        model, predict, inputs: as `fit` has them, the inputs on the model's device.
        outputs: (N, ...), with the graph that gave them.
        directions: makes the cotangents anew, one for each direction.
        precision: the coarsest that anything in the pass was computed in.
    """

    model: torch.nn.Module
    predict: Predict | None
    inputs: Any
    outputs: Tensor
    directions: Callable[[], Iterable[Tensor]]
    precision: float


def check_size(parameters: Parameters, directions: int, count: int) -> None:
    """Raise Unsupported where a block's per-sample gradients of a batch are too many numbers."""
    size = sum(parameter.numel() for parameter in parameters.values())
    if directions * count * size > NUMBERS_LIMIT:
        raise Unsupported(
            f"its {size} parameters have {directions} per-sample gradients for each of {count} "
            f"samples, of {NUMBERS_LIMIT} numbers at most: use smaller batches, or "
            'fisher="mc"'
        )


class Uncovered:
    """Finds per-sample gradients, and remembers what worked.

    Attributes:
        by_graph: whether samples by themselves were found to be of no use.
    """

    def __init__(self) -> None:
        self.by_graph = False

    def samples(
        self, batch: Batch, parameters: Parameters, totals: Mapping[str, list[Tensor | None]]
    ) -> tuple[dict[str, Tensor], set[str]]:
        """Per-sample gradients by parameter, flattened: (S, N, n) each.

        Args:
            totals: by parameter, per direction: the gradient of the whole batch.

        Returns:
            Those, and the parameters whose gradients do not add up to the batch's.
        """
        rows: dict[str, list[Tensor]] = {name: [] for name in parameters}
        off = set()
        for number, cotangent in enumerate(batch.directions()):
            whole = {name: each[number] for name, each in totals.items()}
            found, wrong = self._direction(batch, parameters, cotangent, whole)
            for name, each in rows.items():
                each.append(found[name].reshape(len(cotangent), -1))
            off |= wrong
        return {name: torch.stack(each) for name, each in rows.items()}, off

    def _direction(
        self,
        batch: Batch,
        parameters: Parameters,
        cotangent: Tensor,
        totals: Mapping[str, Tensor | None],
    ) -> tuple[dict[str, Tensor], set[str]]:
        if not self.by_graph:
            found = _alone(batch, parameters, cotangent)
            if found is not None and not _off(found, totals, batch):
                return found, set()
            self.by_graph = True
        # Checkpointed regions run forward again in each of its backward passes.
        with Forward(batch.model, batch.predict).kept():
            found = _by_graph(batch, parameters, cotangent)
        return found, _off(found, totals, batch)


def _alone(batch: Batch, parameters: Parameters, cotangent: Tensor) -> dict[str, Tensor] | None:
    """Each sample run by itself; None where that cannot be."""
    forward = Forward(batch.model, batch.predict)
    try:
        if count_samples(batch.inputs) != len(cotangent):
            return None
        with warnings.catch_warnings():  # of operations that are slow in torch.func
            warnings.filterwarnings("ignore", message="There is a performance drop")
            found = gradients(forward, forward.parameters(parameters), batch.inputs, cotangent)
    except Exception:  # whatever the model raises at a single sample, it may not at the batch
        return None
    return {name: wide(each.detach()) for name, each in found.items()}


def _by_graph(batch: Batch, parameters: Parameters, cotangent: Tensor) -> dict[str, Tensor]:
    """One backward pass a sample through the graph of the batch, from its own outputs alone."""
    held = list(parameters.values())
    rows: dict[str, list[Tensor]] = {name: [] for name in parameters}
    for n in range(len(cotangent)):
        alone = torch.zeros_like(cotangent)
        alone[n] = cotangent[n]
        grads = torch.autograd.grad(
            batch.outputs, held, alone, retain_graph=True, allow_unused=True, materialize_grads=True
        )
        for each, grad in zip(rows.values(), grads, strict=True):
            each.append(wide(grad))
    return {name: torch.stack(each) for name, each in rows.items()}


def _off(
    found: Mapping[str, Tensor], totals: Mapping[str, Tensor | None], batch: Batch
) -> set[str]:
    """The parameters whose per-sample gradients do not add up to the batch's.

    A gradient that is zero but for rounding is judged by the size of the others.
    """
    sizes = {name: each.double().square().sum().sqrt().item() for name, each in found.items()}
    largest = max(sizes.values(), default=0.0)
    wrong = set()
    for name, each in found.items():
        total = totals[name]
        whole = torch.zeros_like(each[0]) if total is None else wide(total)
        left, size = each.sum(0) - whole, sizes[name] + whole.double().norm().item()
        precision = max(batch.precision, coarsest([batch.model.get_parameter(name).dtype]))
        allowed = tolerance(precision, each.device) * size + 10 * precision * largest
        off = left.double().norm().item()
        if math.isfinite(off) and off > allowed:
            wrong.add(name)
    return wrong
