"""A user's model and data, from ``MODULE:FACTORY``."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from kfoc import fit

# What the command decides itself, and what no two of its fits could share.
OWN = ["model", "data", "estimator", "probes", "progress"]
OWN += ["group", "checkpoint", "resume", "storage"]
ARGUMENTS = tuple(name for name in inspect.signature(fit).parameters if name not in OWN)


class CompareError(ValueError):
    """A mistake of the user's, in words for the terminal."""


@dataclass(frozen=True)
class Subject:
    """What is compared on: a model, its data, and arguments of `kfoc.fit`."""

    model: nn.Module
    data: Iterable[Any]
    arguments: dict[str, Any] = field(default_factory=dict)


def load(target: str) -> Subject:
    """What the factory named by `target` returns.

    Args:
        target: "package.module:factory" or "path/to/file.py:factory".

    Raises:
        CompareError: no such module or function, or a return value of another form.
    """
    place, colon, name = target.rpartition(":")
    if not colon or not place or not name:
        raise CompareError(
            f"expected MODULE:FACTORY, such as my_package.models:factory or models.py:factory, "
            f"found {target!r}"
        )
    factory = _function(_module(place), place, name)
    return subject(factory(), target)


def subject(returned: object, target: str) -> Subject:
    """The factory's return value, checked."""
    form = f"{target} must return (model, data) or (model, data, dict of arguments of kfoc.fit)"
    if not isinstance(returned, tuple) or len(returned) not in (2, 3):
        raise CompareError(f"{form}, found {_kind(returned)}")
    model, data, arguments = (*returned, {})[:3]
    if not isinstance(model, nn.Module):
        raise CompareError(f"{form}: the model must be a torch.nn.Module, found {_kind(model)}")
    if not isinstance(data, Iterable) or isinstance(data, (str, bytes, Mapping)):
        raise CompareError(
            f"{form}: the data must be an iterable of batches, such as a DataLoader or a list of "
            f"(inputs, targets), found {_kind(data)}"
        )
    if not isinstance(arguments, Mapping):
        raise CompareError(f"{form}: the arguments must be a dict, found {_kind(arguments)}")
    unknown = [str(name) for name in arguments if name not in ARGUMENTS]
    if unknown:
        raise CompareError(
            f"{target} returns arguments that kfoc.fit does not take here: {', '.join(unknown)}; "
            f"there can be {', '.join(ARGUMENTS)}"
        )
    return Subject(model, data, dict(arguments))


def _module(place: str) -> ModuleType:
    if place.endswith(".py"):
        return _executed(Path(place))
    # As `python -m` does, and not as a console script, which has its own folder there.
    if "" not in sys.path:
        sys.path.insert(0, "")
    try:
        return importlib.import_module(place)
    except ModuleNotFoundError as error:
        if not f"{place}.".startswith(f"{error.name}."):
            raise
        raise CompareError(
            f"there is no module {error.name!r} to import {place!r} from: give its full "
            "dotted name, or the path of a .py file"
        ) from None


def _executed(path: Path) -> ModuleType:
    """The module of a file; its own folder is importable, as if Python had run it."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None or not path.is_file():
        raise CompareError(f"there is no file {path}")
    module = importlib.util.module_from_spec(spec)
    folder = str(path.resolve().parent)
    if folder not in sys.path:
        sys.path.insert(0, folder)
    # Dataclasses and pickled data sets look their module up by its name.
    sys.modules.setdefault(path.stem, module)
    spec.loader.exec_module(module)
    return module


def _function(module: ModuleType, place: str, name: str) -> Callable[[], object]:
    factory = getattr(module, name, None)
    if factory is None:
        own = [v for v in vars(module).values() if getattr(v, "__module__", "") == module.__name__]
        there = [value.__name__ for value in own if callable(value)]
        raise CompareError(
            f"{place} has no {name!r}; what it defines and can be called: "
            f"{', '.join(there) or 'nothing'}"
        )
    if not callable(factory):
        raise CompareError(f"{place}:{name} must be a function, found {_kind(factory)}")
    try:
        inspect.signature(factory).bind()
    except TypeError as error:
        raise CompareError(f"{place}:{name} must be callable without arguments: {error}") from None
    except ValueError:  # a builtin without a signature
        pass
    return factory


def _kind(value: object) -> str:
    if isinstance(value, tuple):
        return f"a tuple of {len(value)}: ({', '.join(type(item).__name__ for item in value)})"
    return type(value).__name__
