"""Which of a model's layers are treated, and why the others are not."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable
from dataclasses import dataclass, field

from torch import nn

from kfoc.embedding import TiedTreatment, tied_treatment
from kfoc.layers import Treatment, Unsupported, checked_treatment
from kfoc.layout import Layout


@dataclass
class Selection:
    """Which layers are treated and how, which are not and why, and which were asked for by name.

    `partners` are modules that share the weight of a treated layer, by that layer's name.
    """

    modules: dict[str, nn.Module] = field(default_factory=dict)
    treatments: dict[str, Treatment] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    named: set[str] = field(default_factory=set)
    partners: dict[str, nn.Module] = field(default_factory=dict)

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
        self.partners.pop(name, None)
        self.skipped[name] = reason


def select(
    model: nn.Module, layers: str | Iterable[str] | None, largest: int | None = None
) -> Selection:
    """Match `layers` against the model's modules that hold parameters of their own.

    Layers that would need a factor of more than `largest` rows are treated where they are named.
    """
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
            partner = _partner(name, module, owners, candidates)
            if partner is None:
                selection.treatments[name] = checked_treatment(module)
            else:
                selection.treatments[name] = tied_treatment(module, partner)
                selection.partners[name] = partner
            selection.modules[name] = module
            if largest is not None and name not in selection.named:
                _check_size(selection, name, largest)
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


def _partner(
    name: str, module: nn.Module, owners: dict[int, list[str]], candidates: dict[str, nn.Module]
) -> nn.Module | None:
    """The module that shares this one's weight, where the two are an embedding and its head.

    The block goes by the name of the first of the two, as the parameter does.
    """
    for parameter_name, parameter in module.named_parameters(recurse=False):
        holders = owners[id(parameter)]
        if len(holders) == 1:
            continue
        others = ", ".join(repr(other) for other in holders if other != name)
        both = [candidates[holder] for holder in holders]
        if parameter_name != "weight" or {type(m) for m in both} != {nn.Embedding, nn.Linear}:
            raise Unsupported(f"it shares a parameter with {others}")
        if len(both) > 2:
            raise Unsupported(f"it shares its weight with {others}: more than two uses")
        if holders[0] != name:
            tied_treatment(*both)  # for the reason, where there is one against both
            raise Unsupported(f"its parameters are in the block of {others}")
        return candidates[holders[1]]
    return None


def _check_size(selection: Selection, name: str, largest: int) -> None:
    """Raise Unsupported for a layer with a factor that is too large to be formed unasked."""
    treatment, module = selection.treatments[name], selection.modules[name]
    tied = isinstance(treatment, TiedTreatment)
    if treatment.direct is not None or isinstance(module, nn.Embedding) or tied:
        return  # without factors, or with a diagonal one
    o, i = selection.layout(name).shape
    sides = {"left": o // treatment.groups, "right": i}
    side = max(sides, key=lambda key: sides[key])
    if sides[side] > largest:
        raise Unsupported(
            f"its {side} factor would have {sides[side]}^2 entries: name the layer in layers=... "
            "to treat it all the same"
        )
