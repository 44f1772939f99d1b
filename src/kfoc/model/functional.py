"""A model as a function of some of its parameters, which leaves the model as it is."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from kfoc.common.ambient import as_called, callers
from kfoc.common.arguments import check_model, check_predict
from kfoc.linalg.scaling import wide
from kfoc.model.batches import (
    Predict,
    Present,
    called,
    check_next_token,
    mapped,
    moved,
    tensor_of,
    tensors_in,
    unpacked,
)
from kfoc.model.buffers import buffers_kept


@dataclass(frozen=True)
class Forward:
    """The outputs of `model` at parameters of one's choice.

    Attributes:
        model: any module whose first dimension, of inputs and outputs, runs over the samples.
        predict: `(model, inputs) -> outputs`, for models that return more than a tensor.
    """

    model: nn.Module
    predict: Predict | None = None

    def __post_init__(self) -> None:
        check_model(self.model)
        check_predict(self.predict)

    def parameters(self, names: Iterable[str]) -> dict[str, Tensor]:
        """The trained values, detached and not copied.

        Raises:
            ValueError: a name that is none of the model's parameters.
        """
        known = dict(self.model.named_parameters(remove_duplicate=False))  # tied ones by any name
        names = list(names)
        missing = [name for name in names if name not in known]
        if missing:
            raise ValueError(
                f"the model has no parameter {', '.join(missing)}: the curvature must be of this "
                f"model, whose parameters are {', '.join(known)}"
            )
        return {name: known[name].detach() for name in names}

    def outputs(self, inputs: Any, parameters: Mapping[str, Tensor]) -> Tensor:
        """(N, ...), with `parameters` in place of the model's own of the same names.

        In float32 at least: what is made of them is too coarse in half precision.
        """
        with self.kept():
            return self.transformed(inputs, parameters)

    def batches(self, data: Iterable[Any]) -> Iterator[tuple[Any, Any]]:
        """Pairs (inputs, targets), of batches as `fit` takes them; empty ones are passed over.

        Raises:
            ValueError: anything else, or labels that the model means to be shifted.
        """
        for batch in Present(as_called(data)):
            check_next_token(self.model, batch, self.predict)
            yield unpacked(batch, self.predict)

    def kept(self) -> AbstractContextManager[None]:
        """The model's buffers are then what they were before."""
        return buffers_kept(self.model.modules())

    def transformed(self, inputs: Any, parameters: Mapping[str, Tensor]) -> Tensor:
        """As `outputs`, for transforms of `torch.func` inside of `kept`, which they cannot do."""
        swapped = {f"model.{name}": value for name, value in parameters.items()}
        with callers():
            outputs = functional_call(_Called(self.model, self.predict), swapped, (inputs,))
        return wide(tensor_of(outputs))

    def trained(self, inputs: Any) -> Tensor:
        """(N, ...), at the trained parameters, and without derivatives.

        Raises:
            ValueError: no samples, or outputs that are not finite.
        """
        with torch.no_grad():
            outputs = self.outputs(inputs, {})
        if not len(outputs):
            raise ValueError("there are no samples")
        if not outputs.isfinite().all():
            # Only then: infinite masks of attention are inputs too.
            odd = not all(tensor.isfinite().all() for tensor in tensors_in(inputs))
            reason = "so are inputs" if odd else "the inputs are: look at the model's parameters"
            raise ValueError(f"the model's outputs have values that are not finite ({reason})")
        return outputs

    def moved(self, value: Any) -> Any:
        """Tensors, however nested, on the model's device."""
        return moved(value, self.model)

    def check_deterministic(self) -> None:
        """Raise where outputs depend on the other samples of the batch, or on chance."""
        for name, module in self.model.named_modules():
            if module.training and isinstance(module, (_BatchNorm, _DropoutNd)):
                raise ValueError(
                    f"layer {name!r} ({type(module).__name__}) is in train mode, where a sample's "
                    "outputs depend on others or on chance: call model.eval()"
                )

    @torch.no_grad()
    def check_separate(self, inputs: Any) -> None:
        """Raise where a sample's outputs are other ones beside other samples, or alone.

        Seen at the first and the last of a few samples, as models may look one way in the batch.
        """
        few = sliced(inputs, slice(4))
        count = count_samples(few)
        together = self.outputs(few, {})
        if count < 2 or len(together) != count:
            return
        size = together.abs().amax().item()
        for place in (0, count - 1):
            one = sliced(few, slice(place, place + 1))
            same = mapped(one, lambda tensor: tensor.repeat_interleave(count, 0))
            here = self.outputs(same, {})[place]
            # Batches of one size are computed by the same steps; those of another may be rounded
            # in other ways, and no one sees in which dtypes within the model.
            moved = (together[place] - here).abs().max().item(), 1e-3
            alone = (here - self.outputs(one, {})[0]).abs().max().item(), 5e-2
            if any(change > share * size for change, share in (moved, alone)):
                raise ValueError(
                    f"sample {place} of a batch has other outputs beside other samples (they move "
                    f"by up to {max(moved[0], alone[0]):.3g}), and each sample's derivatives are "
                    "taken alone: the model must treat samples independently and without chance "
                    "(does it normalise, attend or sum over the first dimension?)"
                )


@contextmanager
def concerning(what: str) -> Iterator[None]:
    """Put the argument, or its batch, before the message of an error about its values."""
    try:
        yield
    except ValueError as error:
        if type(error) is not ValueError:  # the user's own
            raise
        raise ValueError(f"{what}: {error}") from error


class _Called(nn.Module):
    """Gives `functional_call` one module to swap parameters in, whatever the model is called by."""

    def __init__(self, model: nn.Module, predict: Predict | None) -> None:
        super().__init__()
        self.model = model
        self.predict = predict

    def forward(self, inputs: Any) -> Any:
        return (self.predict or called)(self.model, inputs)


def sliced(value: Any, part: slice | int) -> Any:
    """A part of the samples of every tensor in `value`, however nested."""
    return mapped(value, lambda tensor: tensor[part])


def first_samples(inputs: Any, least: int, most: int) -> Any | None:
    """An eighth of the samples, within limits, or None where not all tensors run over them."""
    try:
        count = count_samples(inputs)
    except ValueError:
        return None
    few = max(least, min(most, count // 8))
    return sliced(inputs, slice(few)) if count > few else None


def count_samples(inputs: Any) -> int:
    """The size of the first dimension of the tensors in `inputs`.

    Raises:
        ValueError: no tensors, several sizes, or no samples.
    """
    sizes = {len(tensor) if tensor.ndim else -1 for tensor in tensors_in(inputs)}
    if len(sizes) != 1 or -1 in sizes:
        found = "none" if not sizes else f"first dimensions of {sorted(sizes)}"
        raise ValueError(
            f"the inputs must be tensors whose first dimension runs over the samples, found {found}"
        )
    if 0 in sizes:
        raise ValueError("there are no samples")
    return sizes.pop()
