"""A session in plain terms, for checkpoints and the states of trackers, and back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from kfoc.files.encoding import copied, decoded, encoded
from kfoc.files.hints import check_all
from kfoc.fitting.layer_fit import LayerFit
from kfoc.fitting.marks import Mark
from kfoc.fitting.session import Session
from kfoc.layers.selection import Selection

# What is kept of a session, and of which layers it treats: the treatments follow from the model.
_SESSION = {
    "layers": "dict[str, LayerFit]",
    "marks": "list[Mark]",
    "batches": "int",
    "samples": "int",
    "weight": "float",
    "passes": "int",
    "num_samples": "int",
    "by_graph": "bool",
    "selection": "dict[str, object]",
}
_SELECTION = {
    "layers": "list[str]",
    "loose": "dict[str, list[str]]",
    "skipped": "dict[str, str]",
}
_COUNTS = "batches", "samples", "weight", "passes", "num_samples"


def state_of(session: Session, take: Callable[[Tensor], Tensor] = copied) -> dict[str, Any]:
    """All that has been collected, in dicts, lists, numbers, strings and tensors.

    Args:
        take: what becomes of the tensors: copies, or what `encoded` takes else.
    """
    selection = session.selection
    counts = {name: getattr(session, name) for name in _COUNTS}
    return counts | {
        "layers": encoded(session.layers, take),
        "marks": encoded(session.marks, take),
        # What the reader has learnt: so that a fit that goes on does so in the same way.
        "by_graph": session.reader.uncovered.by_graph,
        "selection": {
            "layers": list(selection.layers),
            "loose": {name: list(parameters) for name, parameters in selection.loose.items()},
            "skipped": dict(selection.skipped),
        },
    }


def checked(state: Any, session: Session, device: torch.device | None = None) -> dict[str, Any]:
    """A state as `load` takes it; the session, which is new, stays as it is.

    Args:
        device: of the tensors' copies; None: the tensors that there are.

    Raises:
        ValueError: it is not of this form, or names what the session's model does not have.
    """
    check_all(state, _SESSION | {"layers": "dict", "marks": "list"})
    found = state | {key: decoded(state[key], device) for key in ("layers", "marks")}
    check_all(found, _SESSION, {"LayerFit": LayerFit, "Mark": Mark})
    check_all(found["selection"], _SELECTION)
    if min(found[name] for name in _COUNTS) < 0:
        raise ValueError("there is a negative number of samples, batches or passes")
    selection, layers = found["selection"], found["layers"]
    known = session.selection
    loose = [name for each in selection["loose"].values() for name in each]
    for kind, given, there in (
        ("layer", selection["layers"], known.layers.keys() | known.watched.keys()),
        ("layer", layers, {*selection["layers"], *selection["loose"]}),
        ("parameter", loose, dict(session.task.model.named_parameters(remove_duplicate=False))),
    ):
        unknown = sorted(set(given) - set(there))
        if unknown:
            raise ValueError(f"there is a {kind} {unknown[0]!r}, which this fit does not have")
    for name, layer in layers.items():
        expected = type(session.task.estimator.begin(name, layer.silent))
        if layer.name != name or type(layer.state) not in (expected, type(None)):
            raise ValueError(
                f"the state of layer {name!r} must be a {expected.__name__}, found "
                f"{layer.state!r:.60} of layer {layer.name!r}"
            )
    return found


def load(session: Session, found: dict[str, Any]) -> None:
    """Put a new session where the one was that a `checked` state is of."""
    for name in _COUNTS:
        setattr(session, name, found[name])
    session.layers.update(found["layers"])
    session.marks[:] = found["marks"]
    session.reader.uncovered.by_graph = found["by_graph"]
    _restore(session.selection, session.task.model, found["selection"])


def _restore(selection: Selection, model: nn.Module, saved: dict[str, Any]) -> None:
    """In place: what watches the forward passes watches it as it was at the start of the fit."""
    selection.promote(selection.watched.keys() & set(saved["layers"]))
    selection.watched.clear()
    for name in selection.layers.keys() - set(saved["layers"]):
        del selection.layers[name]
    loose = {
        name: {key: model.get_parameter(key) for key in parameters}
        for name, parameters in saved["loose"].items()
    }
    selection.loose.clear()
    selection.loose.update(loose)
    selection.skipped.clear()
    selection.skipped.update(saved["skipped"])
