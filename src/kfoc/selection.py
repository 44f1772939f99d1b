"""Which of a model's layers are treated, and why the others are not."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable
from dataclasses import dataclass, field

from torch import nn

from kfoc.layers import Treatment, Unsupported, checked_treatment
from kfoc.layout import Layout


@dataclass
class Selection:
    """Which layers are treated and how, which are not and why, and which were asked for by name."""

    modules: dict[str, nn.Module] = field(default_factory=dict)
    treatments: dict[str, Treatment] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    named: set[str] = field(default_factory=set)

    def layout(self, name: str) -> Layout:
        """Where a treated layer's parameters lie in the matrix of its block."""
        treatment, own = self.treatments[name], self.modules[name]
        prefix = f"{name}." if name else ""
        return Layout(
            tuple(prefix + parameter for parameter in treatment.parameters),
            tuple(tuple(own.get_parameter(p).shape) for p in treatment.parameters),
            treatment.layout,
            treatment.groups,
        )

    def drop(self, name: str, reason: str) -> None:
        """Leave a layer out after all. Raises ValueError where it was asked for by name."""
        if name in self.named:
            raise ValueError(f"layer {name!r} cannot be treated: {reason}")
        self.modules.pop(name, None)
        self.treatments.pop(name, None)
        self.skipped[name] = reason


def select(model: nn.Module, layers: str | Iterable[str] | None) -> Selection:
    """Match `layers` against the model's modules that hold parameters of their own."""
    candidates = {
        name: module
        for name, module in model.named_modules()
        if next(module.parameters(recurse=False), None) is not None
    }
    patterns = None if layers is None else [layers] if isinstance(layers, str) else list(layers)
    selection = Selection(named={p for p in patterns or () if p in candidates})
    for pattern in patterns or ():
        if not fnmatch.filter(candidates, pattern):
            raise ValueError(
                f"layers: {pattern!r} matches no layer with parameters; there are "
                f"{', '.join(map(repr, candidates))}"
            )
    owners = _owners(candidates)
    for name, module in candidates.items():
        if patterns is not None and not any(fnmatch.fnmatchcase(name, p) for p in patterns):
            continue
        try:
            selection.treatments[name] = _treatment(name, module, owners)
            selection.modules[name] = module
        except Unsupported as reason:
            selection.drop(name, str(reason))
    if not selection.modules:
        raise ValueError(f"no layer can be treated: {selection.skipped or 'no parameters'}")
    return selection


def _owners(candidates: dict[str, nn.Module]) -> dict[int, list[str]]:
    """Parameter identity -> the names of the modules that hold it."""
    owners: dict[int, list[str]] = {}
    for name, module in candidates.items():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(id(parameter), []).append(name)
    return owners


def _treatment(name: str, module: nn.Module, owners: dict[int, list[str]]) -> Treatment:
    for parameter in module.parameters(recurse=False):
        others = [other for other in owners[id(parameter)] if other != name]
        if others:
            raise Unsupported(f"it shares a parameter with {', '.join(map(repr, others))}")
    return checked_treatment(module)
