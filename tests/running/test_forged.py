"""Checkpoints and states that are whole by their checksum, and hold what no fit has written."""

from __future__ import annotations

import copy
import importlib
import inspect
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import kfoc
from kfoc.files.encoding import decoded
from kfoc.files.kinds import KINDS
from kfoc.running import checkpointed as checkpoints
from test_checkpoint import ESTIMATORS, MODELS, Cut, StopError, interrupted


def places(value: Any, inside: tuple = ()) -> Iterator[tuple]:
    """Where in a file something lies, as the keys that lead to it."""
    yield inside
    if isinstance(value, list):
        value = dict(enumerate(value))
    for key, item in value.items() if isinstance(value, dict) else ():
        yield from places(item, (*inside, key))


def replaced(content: dict, place: tuple, value: Any) -> dict:
    if not place:
        return value
    content = copy.copy(content)
    content[place[0]] = replaced(content[place[0]], place[1:], value)
    return content


def at(content: Any, place: tuple) -> Any:
    return at(content[place[0]], place[1:]) if place else content


def of_another_type(value: Any) -> list[Any]:
    if value is None or isinstance(value, str):
        return [[1]]  # numbers and texts may be there
    return ["forged", torch.ones(2) if isinstance(value, (bool, int, float)) else 5]


def forgeries(content: dict) -> Iterator[tuple[tuple, Any]]:
    """Values of another type in every entry of the file, and in every field of every class once."""
    seen = set()
    for place in places(content):
        what = place
        if len(place) > 1 and place[-2] == "fields":
            what = at(content, place[:-2])["object"], place[-1]
        elif len(place) > 2 and place[:2] != ("session", "selection"):
            continue
        if what not in seen:
            seen.add(what)
            for value in of_another_type(at(content, place)):
                yield place, value


@pytest.mark.parametrize("name", ["small buffer", "rank 2", "ekfac"])
def test_values_of_another_type_are_named(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.fsync", lambda file: None)
    model, data, options = MODELS["mixed"]()
    options["estimator"] = ESTIMATORS[name](model)
    every = kfoc.Checkpoint(tmp_path, seconds=None, batches=1)
    with pytest.raises(StopError):
        kfoc.fit(model, Cut(data), checkpoint=every, **options)
    content = checkpoints.read(every.path)
    count = 0
    monkeypatch.setattr(nn.Module, "__call__", None)  # the model is not reached
    for place, value in forgeries(content):
        checkpoints.write(every.path, replaced(content, place, value))
        with pytest.raises(ValueError, match=r"^checkpoint: .*fit\.checkpoint' "):
            kfoc.fit(model, data, checkpoint=every, resume=True, **options)
        count += 1
    assert count > 50


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (("session",), {"estimator": 5}, "no 'layers', found 'estimator'"),
        (("session", "passes"), -1, "negative number"),
        (("seconds",), -1.0, "negative number"),
        (("session", "layers", "items", 0, 0), "other", "a layer 'other', which this fit does"),
        (
            ("session", "layers", "items", 0, 1, "fields", "name"),
            "other",
            "must be a Online, found .* of layer 'other'",
        ),
        (
            ("session", "selection", "layers"),
            ["other"],
            "a layer 'other', which this fit does not have",
        ),
        (("session", "selection", "loose"), {"3": ["other"]}, "a parameter 'other', which"),
        (("buffers",), {"other.x": None}, "a module with a buffer 'other', which"),
        (("session", "layers", "items", 0, 1), {"dtype": "compile"}, "no state of kfoc"),
        (("session", "layers", "items", 0, 1), {"tuple": 5}, "no state of kfoc"),
        (("session", "layers"), {"items": [[[], 5]]}, "no state of kfoc: .*hashable"),
        ((), [1], "found list"),
    ],
)
def test_what_this_fit_does_not_have_is_named(
    place: tuple, value: Any, message: str, tmp_path: Path
) -> None:
    model, data = interrupted(tmp_path)
    path = tmp_path / checkpoints.FILE
    content = checkpoints.read(path)
    checkpoints.write(path, replaced(content, place, value))
    with pytest.raises(ValueError, match=rf"does not hold what a fit saves: .*{message}"):
        kfoc.fit(model, data, checkpoint=tmp_path, resume=True)


def test_nothing_is_imported_for_a_file() -> None:
    places = "kfoc.__main__:main", "reproduce.cli:main", "os:system", "samples.inputs:Rows"
    for name in (*places, "fit", "", "rows"):
        before = set(sys.modules)
        with pytest.raises(ValueError, match="does not have: load it with the version"):
            decoded({"object": name, "fields": {}}, None)
        assert set(sys.modules) == before


def test_every_name_in_files_leads_to_a_class() -> None:
    for name, place in KINDS.items():
        module, _, qualified = place.partition(":")
        kind = getattr(importlib.import_module(f"kfoc.{module}"), qualified)
        assert isinstance(kind, type), name
        assert (kind.__module__, kind.__qualname__) == (f"kfoc.{module}", qualified), name
    assert len(set(KINDS.values())) == len(KINDS)


def test_public_blocks_and_estimators_have_a_name_in_files() -> None:
    for name in kfoc.__all__:
        kind = getattr(kfoc, name)
        if isinstance(kind, type) and issubclass(kind, (kfoc.Block, kfoc.Estimator)):
            place = f"{kind.__module__.removeprefix('kfoc.')}:{kind.__qualname__}"
            assert place in KINDS.values() or inspect.isabstract(kind), name


@pytest.mark.parametrize("dtype", ["nn", "load", "compile", "float63", 5, [], None])
def test_dtypes_are_dtypes(dtype: Any) -> None:
    with pytest.raises(ValueError, match="no state of kfoc"):
        decoded({"dtype": dtype}, None)


def test_methods_are_not_replaced() -> None:
    state = {"object": "KFAC state", "fields": {"left": 1, "add": 2}}
    with pytest.raises(ValueError, match="in which there is no 'right'"):
        decoded(state, None)
    tensors = dict.fromkeys(("vectors", "products", "unseen"), torch.ones(1))
    fields = {**tensors, "unit": 1.0, "seed": 0}
    for more, message in (
        ({"add": 5}, "a 'add', which is none of"),
        ({"unit": "x"}, "'unit' must"),
    ):
        with pytest.raises(ValueError, match=f"a Probes in which .*{message}"):
            decoded({"object": "Probes", "fields": fields | more}, None)
