"""Batches as people have them: inputs apart from targets, moved to the model, and through it."""

from __future__ import annotations

import copy
import dataclasses
import inspect
from collections import UserDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

LABELS = "labels"

Predict = Callable[[nn.Module, Any], Any]


def unpacked(batch: Any, predict: Predict | None = None) -> tuple[Any, Any]:
    """(inputs, targets) of one batch of the data; the batch itself is not changed.

    What `predict` makes of the targets, where it has a method `targets`, is in their place.

    | batch | inputs | targets |
    |---|---|---|
    | mapping, dataclass or NamedTuple with "labels" | the rest of it | its labels |
    | any other mapping or dataclass | all of it | None |
    | tuple, list or NamedTuple of two | the first | the second |
    | tuple or list of one | that one | None |

    The rest of a mapping is a copy without "labels"; a dataclass or NamedTuple keeps the field,
    with None in it.

    Raises:
        ValueError: anything else. A tensor alone may be a data set that was passed as `data`.
    """
    inputs, targets = _parts(batch)
    change = getattr(predict, "targets", None)
    return (inputs, change(inputs, targets)) if callable(change) else (inputs, targets)


def _parts(batch: Any) -> tuple[Any, Any]:
    if isinstance(batch, Mapping):
        rest = _mapping(batch, {key: item for key, item in batch.items() if key != LABELS})
        return rest, batch.get(LABELS)
    names = _fields(batch)
    if LABELS in names or (names and not isinstance(batch, tuple)):
        targets = getattr(batch, LABELS, None)
        return (_rebuilt(batch, {LABELS: None}) if LABELS in names else batch), targets
    if isinstance(batch, (tuple, list)) and len(batch) in (1, 2):
        return batch[0], batch[1] if len(batch) == 2 else None
    found = f"{type(batch).__name__}" + (f" of {len(batch)}" if hasattr(batch, "__len__") else "")
    raise ValueError(
        f"data must yield pairs (inputs, targets), found a {found}: put several inputs into one "
        "tuple or dict, ((a, b), targets), and None for targets that there are not; mappings and "
        'dataclasses may have their targets under "labels"'
    )


def moved(value: Any, to: nn.Module | torch.device) -> Any:
    """`value` with its tensors on a device or the model's, however nested; `value` stays as it is.

    Looks into tuples, NamedTuples, lists, mappings and dataclasses; other objects are passed on.
    """
    device = to if isinstance(to, torch.device) else next(to.parameters()).device
    return mapped(value, lambda tensor: _usable(tensor).to(device))


def called(model: nn.Module, inputs: Any) -> Any:
    """The model at its inputs: by name for mappings, dataclasses and NamedTuples, else in order."""
    if isinstance(inputs, Mapping):
        return _bound(model, (), inputs)
    names = _fields(inputs)
    if names:
        arguments = {name: getattr(inputs, name) for name in names}
        if arguments.get(LABELS, False) is None:  # they were the targets
            del arguments[LABELS]
        return model(**arguments)
    if isinstance(inputs, (tuple, list)) and not isinstance(inputs, PackedSequence):
        return _bound(model, tuple(inputs), {})
    return model(inputs)


def _bound(model: nn.Module, args: tuple[Any, ...], named: Mapping[str, Any]) -> Any:
    """Call it. Where it does not take such arguments, it may take what holds them as one."""
    try:
        return model(*args, **named)
    except TypeError as error:
        try:
            inspect.signature(model.forward).bind(*args, **named)
        except TypeError:
            how = f"by name ({', '.join(map(str, named))})" if named else f"in order, {len(args)}"
            raise ValueError(
                f"{type(model).__name__}.forward does not take its inputs {how}: {error}; where it "
                "takes the whole batch as one argument, pass predict=lambda model, inputs: "
                "model(inputs)"
            ) from error
        except ValueError:  # no signature to be had
            pass
        raise


class Present:
    """Batches that are not empty, as often as data can be read. What `len` says counts all."""

    def __init__(self, data: Iterable[Any]) -> None:
        self.data = data

    def __iter__(self) -> Iterator[Any]:
        return (batch for batch in self.data if not empty(batch))

    def __len__(self) -> int:
        return len(self.data)  # type: ignore[arg-type]


def empty(batch: Any) -> bool:
    """Whether there are tensors among a batch's inputs, and all are of no samples."""
    try:
        inputs, _ = unpacked(batch)
    except ValueError:  # which is told where it is taken in
        return False
    lengths = [len(tensor) if tensor.ndim else 1 for tensor in tensors_in(inputs)]
    return bool(lengths) and not any(lengths)


def check_next_token(model: nn.Module, batch: Any, predict: Predict | None) -> None:
    """The labels in a batch are the tokens, which transformers' causal models shift: we do not.

    Raises:
        ValueError: such a model, labels in the batch, and no `predict` that drops the last logits.
    """
    can_generate = getattr(model, "can_generate", None)
    if predict is not None or not callable(can_generate) or not can_generate():
        return
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return  # the labels are the decoder's, which are not its inputs
    if not isinstance(batch, (list, tuple)) or LABELS in _fields(batch):
        _, labels = unpacked(batch)
        if labels is not None:
            raise ValueError(
                f"{type(model).__name__} predicts the next token, and the labels in a batch are "
                "the tokens themselves: pass predict=kfoc.next_token, which shifts them"
            )


def tensor_of(outputs: Any) -> Tensor:
    """What the model returned as a tensor of outputs: itself, or its `.logits`.

    Raises:
        ValueError: no tensor, or complex numbers.
    """
    if not isinstance(outputs, Tensor):
        logits = getattr(outputs, "logits", None)
        if not isinstance(logits, Tensor):
            raise ValueError(
                f"the model returned a {type(outputs).__name__}, not a tensor: pass "
                "predict=lambda model, inputs: ... that returns the outputs"
            )
        outputs = logits
    if outputs.is_complex():
        raise ValueError(
            f"the model's outputs are complex ({outputs.dtype}): pass predict=lambda model, "
            "inputs: ... that returns real ones, such as torch.view_as_real(...)"
        )
    return outputs


def checked_outputs(outputs: Any, inputs: Any) -> Tensor:
    """As `tensor_of`. Raises ValueError for no samples in the first dimension, or no gradient."""
    outputs = tensor_of(outputs)
    if not outputs.numel() or not outputs.ndim:
        raise ValueError(f"the model's outputs have the shape {tuple(outputs.shape)}")
    if isinstance(inputs, Tensor) and inputs.ndim and len(inputs) != len(outputs):
        raise ValueError(
            f"{len(inputs)} inputs gave outputs of shape {tuple(outputs.shape)}: the first "
            "dimension must be the samples"
        )
    if not outputs.requires_grad:
        raise ValueError("the outputs carry no gradient: no parameter on their way is trained")
    return outputs


def _usable(tensor: Tensor) -> Tensor:
    """Tensors from inference mode cannot take part in a backward pass; copies can."""
    return tensor.clone() if tensor.is_inference() else tensor


def mapped(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """`value` with every tensor in it changed, in copies of what holds them."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, PackedSequence):  # its sizes stay on the CPU
        return value._replace(data=change(value.data))
    if isinstance(value, Mapping):
        return _mapping(value, {key: mapped(item, change) for key, item in value.items()})
    names = _fields(value)
    if names:
        return _rebuilt(value, {name: mapped(getattr(value, name), change) for name in names})
    if isinstance(value, (tuple, list)):
        items = (mapped(item, change) for item in value)
        return tuple(items) if isinstance(value, tuple) else list(items)
    return value


def tensors_in(value: Any) -> list[Tensor]:
    """The tensors in `value`, however nested."""
    found: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    mapped(value, note)
    return found


def _mapping(like: Mapping, items: dict) -> Mapping:
    """`items` in a mapping as `like` is, where that can be copied with what else it holds."""
    copies = isinstance(like, (dict, UserDict)) and not dataclasses.is_dataclass(like)
    if type(like) is dict or not copies:
        return items
    found: Any = copy.copy(like)  # transformers' BatchEncoding is a UserDict
    for key in found.keys() - items.keys():
        del found[key]
    found.update(items)
    return found


def _fields(value: Any) -> tuple[str, ...]:
    """The field names of a dataclass or NamedTuple; none for anything else."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return tuple(entry.name for entry in dataclasses.fields(value))
    named = isinstance(value, tuple) and not isinstance(value, PackedSequence)
    return tuple(getattr(value, "_fields", ())) if named else ()


def _rebuilt(value: Any, changes: dict[str, Any]) -> Any:
    """A copy of a dataclass or NamedTuple with other values in some fields."""
    if isinstance(value, tuple):
        return value._replace(**changes)  # type: ignore[attr-defined]
    found = copy.copy(value)
    for name, item in changes.items():
        object.__setattr__(found, name, item)  # also where it is frozen
    return found
