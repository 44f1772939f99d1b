"""A model's outputs of one batch as a linear map of its parameters, there and back."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import jvp, vmap

from kfoc.errors import out_of_memory
from kfoc.fitting.marks import Mark
from kfoc.linalg.scaling import wide
from kfoc.model.functional import Forward

Vectors = Mapping[str, Tensor]


@dataclass
class Modes:
    """What a model was found to need or not to allow, so that no batch tries again.

    Attributes:
        forward: derivatives in forward mode: custom functions, and kernels of recurrent layers,
            may have none. Two reverse passes do then.
        batched: several vectors in one reverse pass.
        numbers: that a graph keeps for each sample; 0 before it was counted.
    """

    forward: bool = True
    batched: bool = True
    numbers: float = 0.0


class Linearised:
    """`J`, the outputs' derivative by some parameters, at one batch.

    Args:
        forward: the model.
        parameters: by name: where the derivative is taken, and by which.
        inputs: on the model's device.
        drawn: a context in which the model draws the same numbers each time.
        modes: what was learnt from other batches.
    """

    def __init__(
        self,
        forward: Forward,
        parameters: Vectors,
        inputs: Any,
        drawn: Callable[[], AbstractContextManager[None]],
        modes: Modes,
    ) -> None:
        self.forward, self.inputs, self.drawn, self.modes = forward, inputs, drawn, modes
        self.at = {name: value.detach() for name, value in parameters.items()}
        self.leaves = {name: value.detach().requires_grad_() for name, value in self.at.items()}
        # Of the others no derivative is asked for: without them the graph is smaller.
        known = dict(forward.model.named_parameters(remove_duplicate=False))
        chosen = {id(known[name]) for name in self.at}  # tied ones by any name
        named = forward.model.named_parameters()
        self.others = {name: p.detach() for name, p in named if id(p) not in chosen}
        self.padding = _padding(forward.model, known, self.at)
        self.outputs = self._outputs(self.leaves)

    def _outputs(self, parameters: Vectors) -> Tensor:
        with self.drawn():
            return self.forward.transformed(self.inputs, {**self.others, **parameters})

    def numbers(self) -> int:
        """How many numbers a graph of the batch keeps, which bounds those of one derivative."""
        if not self.modes.numbers:
            sizes: list[int] = []

            def note(tensor: Tensor) -> Tensor:
                sizes.append(tensor.numel())
                return tensor

            # A graph of its own: where values are noted, autograd does not see them change.
            with torch.autograd.graph.saved_tensors_hooks(note, lambda kept: kept):
                self._outputs(self.leaves)
            self.modes.numbers = sum(sizes) / len(self.outputs)
        return int(self.modes.numbers * len(self.outputs))

    def there(self, vectors: Vectors) -> Tensor:
        """`J v`, (k, N, ...), of vectors name -> (k, *shape)."""
        if self.modes.forward:
            found = self._forward_mode(vectors)
            if found is not None:
                return found
            self.modes.forward = False
        return self._twice_reversed(vectors)

    def back(self, cotangents: Tensor) -> dict[str, Tensor]:
        """`J^T u`, name -> (k, *shape), of cotangents (k, N, ...)."""
        if len(cotangents) > 1 and self.modes.batched:
            try:
                return self._pulled(cotangents, is_grads_batched=True)
            except (RuntimeError, UserWarning) as error:  # an operation that vmap does not know
                if out_of_memory(error):
                    raise
                self.modes.batched = False
        rows = [self._pulled(cotangent) for cotangent in cotangents]
        return {name: torch.stack([row[name] for row in rows]) for name in self.at}

    def _pulled(self, cotangents: Tensor, **options: bool) -> dict[str, Tensor]:
        leaves = list(self.leaves.values())
        pulled = torch.autograd.grad(
            self.outputs, leaves, cotangents, retain_graph=True, allow_unused=True, **options
        )
        lead = cotangents.shape[: cotangents.ndim - self.outputs.ndim]
        return {
            name: leaf.new_zeros(*lead, *leaf.shape) if part is None else _dense(part)
            for (name, leaf), part in zip(self.leaves.items(), pulled, strict=True)
        }

    def _forward_mode(self, vectors: Vectors) -> Tensor | None:
        """None where the model has no forward mode, or not that of its outputs (chance)."""

        def one(vector: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
            found = jvp(self._outputs, (self.at,), (vector,))
            return found[0], found[1]

        _load_forward_mode()
        tangents = {name: vector.to(self.at[name]) for name, vector in vectors.items()}
        for name, row in self.padding:
            tangents[name] = tangents[name].index_fill(1, row, 0.0)
        try:
            # Nothing needs a graph of this; torch.func differentiates all the same.
            with torch.no_grad():
                if len(next(iter(tangents.values()))) == 1:
                    single = {name: vector[0] for name, vector in tangents.items()}
                    outputs, found = (each[None] for each in one(single))
                else:
                    outputs, found = vmap(one, randomness="same")(tangents)
        except (RuntimeError, ValueError, UserWarning) as error:
            if out_of_memory(error):
                raise
            return None
        if not Mark.of(outputs[0]).same(Mark.of(self.outputs)):
            return None
        return found

    def _twice_reversed(self, vectors: Vectors) -> Tensor:
        """The derivative of `J^T u` by u, along v."""
        leaves = list(self.leaves.values())
        dummy = torch.zeros_like(self.outputs, requires_grad=True)
        pulled = torch.autograd.grad(
            self.outputs, leaves, dummy, create_graph=True, allow_unused=True
        )
        used = [
            (part, vectors[name])
            for name, part in zip(self.leaves, pulled, strict=True)
            if part is not None and part.requires_grad
        ]
        found = []
        for k in range(len(next(iter(vectors.values())))):
            along = [each[k].to(part) for part, each in used]
            (tangent,) = torch.autograd.grad(
                [part for part, _ in used], dummy, along, retain_graph=True
            )
            found.append(tangent)
        return torch.stack(found)


def _padding(
    model: nn.Module, known: Mapping[str, Tensor], names: Iterable[str]
) -> list[tuple[str, Tensor]]:
    """Rows of embeddings that have no gradient in torch, but for its forward mode."""
    chosen = {id(known[name]): name for name in names}
    return [
        (chosen[id(module.weight)], torch.tensor([module.padding_idx], device=module.weight.device))
        for module in model.modules()
        if isinstance(module, nn.Embedding) and module.padding_idx is not None
        if id(module.weight) in chosen
    ]


@cache
def _load_forward_mode() -> None:
    """What torch loads for it warns, of torch itself."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        jvp(torch.sin, (torch.zeros(()),), (torch.ones(()),))


def _dense(gradient: Tensor) -> Tensor:
    return wide(gradient.to_dense() if gradient.is_sparse else gradient)
