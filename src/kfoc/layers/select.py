"""Which layers of a model a fit begins with: matched by name, each with its treatment."""

from __future__ import annotations

import fnmatch
from collections.abc import Collection, Iterable

from torch import nn

from kfoc.layers.attention import inlined, part_name
from kfoc.layers.layer import Layer
from kfoc.layers.parts import part_of
from kfoc.layers.rule import (
    Refused,
    Treatment,
    Unsupported,
    checked_treatment,
    has_rule,
    own_parameters,
    trained_parameters,
)
from kfoc.layers.selection import Selection
from kfoc.layers.tied import TiedTreatment, tied_treatment
from kfoc.layers.watched import watchable

# What a name must have to match as a pattern.
_WILD = frozenset("*?[")


def select(
    model: nn.Module, layers: str | Iterable[str] | None, largest: int | None = None
) -> Selection:
    """Match `layers` against the model's modules that hold parameters of their own.

    What matches none of them is matched against the parameters, which are then layers each.
    Layers that would need a factor of more than `largest` rows are treated where they are named.
    """
    every = dict(model.named_modules())
    candidates = {name: module for name, module in every.items() if own_parameters(module)}
    patterns = None if layers is None else [layers] if isinstance(layers, str) else list(layers)
    selection = Selection(every, candidates)
    chosen: Collection[str] = candidates.keys()
    if patterns is not None:
        parts = [part_name(n, key) for n, m in candidates.items() for key in own_parameters(m)]
        chosen = _matching(candidates, parts, patterns)
        selection.named = {p for p in patterns if p in chosen}
    owners = _owners(candidates)
    for name, module in candidates.items():
        if name in chosen:
            _add(selection, name, module, owners)
        else:
            for key in own_parameters(module):
                if part_name(name, key) in chosen:
                    _add_part(selection, name, key, owners)
    for layer in [each for each in selection.layers.values() if each.name not in selection.named]:
        if largest is not None:
            _check_size(selection, layer, largest)
    if not selection.blocks and not selection.watched:
        raise ValueError(f"no layer can be treated: {selection.skipped or 'no parameters'}")
    for name, module in every.items():
        whole = inlined(module)
        if whole is None:
            continue
        if any(selection.of_module(part_name(name, part)) for part in whole.parts):
            selection.inlined[name] = whole
    return selection


def chosen_parameters(
    model: nn.Module, layers: str | Iterable[str] | None
) -> dict[str, nn.Parameter]:
    """Trained parameters of what matches `layers`, as for `select`, by full name, each once.

    Raises:
        ValueError: a pattern that matches nothing with parameters, or none of them is trained.
    """
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if layers is not None:
        held = {n: own_parameters(m) for n, m in model.named_modules() if own_parameters(m)}
        parts = {part_name(n, key): p for n, own in held.items() for key, p in own.items()}
        chosen = _matching(held, parts, [layers] if isinstance(layers, str) else layers)
        kept = {id(p) for name in chosen & held.keys() for p in held[name].values()}
        kept |= {id(parts[name]) for name in chosen - held.keys()}
        named = {name: p for name, p in named.items() if id(p) in kept}
    if not named:
        where = "the model" if layers is None else f"layers={layers!r}"
        raise ValueError(f"{where} has no parameters that are trained (requires_grad is False)")
    return named


def _matching(
    candidates: Collection[str], parts: Collection[str], patterns: Iterable[str]
) -> set[str]:
    """The names that match a pattern, of parts where no module's does; each must match one."""
    chosen: set[str] = set()
    for pattern in patterns:
        for names in (candidates, parts):
            if _WILD.isdisjoint(pattern):  # as a rule: without a regular expression then
                found = {pattern} & set(names)
            else:
                found = {name for name in names if fnmatch.fnmatchcase(name, pattern)}
            if found:
                break
        else:
            raise ValueError(
                f"layers: {pattern!r} matches no layer with parameters; there are "
                f"{', '.join(map(repr, candidates))}"
            )
        chosen.update(found)
    return chosen


def _owners(candidates: dict[str, nn.Module]) -> dict[int, list[str]]:
    """Parameter identity -> the names of the modules that hold it."""
    owners: dict[int, list[str]] = {}
    for name, module in candidates.items():
        for parameter in own_parameters(module).values():
            owners.setdefault(id(parameter), []).append(name)
    return owners


def _add(selection: Selection, name: str, module: nn.Module, owners: dict[int, list[str]]) -> None:
    """Give a module a treatment, or its parameters another place."""
    trained = trained_parameters(module)
    if any(parameter.is_complex() for parameter in trained.values()):
        selection.skip(name, "complex parameters")
        return
    others = {other for p in trained.values() for other in owners[id(p)] if other != name}
    held = selection.held() if others else {}
    try:
        found, twins = _treatments(module, {n: selection.candidates[n] for n in sorted(others)})
    except Refused as reason:
        selection.skip(name, str(reason))
    except Unsupported as reason:
        if not has_rule(module) and not others:
            selection.watched.update(watchable(name, module))
        selection.drop(name, str(reason))
    else:
        if any(id(parameter) in held for parameter in trained.values()):
            selection.drop(name, "it shares a parameter with another layer")
            return
        selection.layers[name] = Layer(name, name, module, found, tuple(twins))
        for key, parameter in trained.items():
            if key not in found.parameters:
                full = part_name(name, key)
                selection.loosen(full, {full: parameter}, f"not covered by that of {name!r}")


def _add_part(selection: Selection, home: str, key: str, owners: dict[int, list[str]]) -> None:
    """Make a parameter a layer of its own."""
    name, module = part_name(home, key), selection.candidates[home]
    parameter = own_parameters(module)[key]
    others = {n: selection.candidates[n] for n in owners[id(parameter)] if n != home}
    if id(parameter) in (held := selection.held() if others else {}):
        selection.cover(name, {held[id(parameter)]})
        return
    try:
        if not parameter.requires_grad:
            raise Refused("it is frozen (requires_grad is False)")
        if parameter.is_complex():
            raise Refused("it is complex")
        whole, twins = _treatments(module, others)
        found = part_of(whole, key)
    except Refused as reason:
        selection.skip(name, str(reason))
    except Unsupported as reason:
        selection.loosen(name, {name: parameter}, str(reason))
    else:
        parts = tuple((other, part_of(each, key)) for other, each in twins)
        selection.layers[name] = Layer(name, home, module, found, parts)


def _treatments(
    module: nn.Module, others: dict[str, nn.Module]
) -> tuple[Treatment, list[tuple[nn.Module, Treatment]]]:
    """The treatment of a module, and of the others that hold parameters of its own."""
    if len(others) == 1:
        (other,) = others.values()
        if {type(module), type(other)} == {nn.Embedding, nn.Linear}:
            tied = tied_treatment(module, other)
            return tied, [(other, tied)]
    found = checked_treatment(module)
    return found, [_twin(name, other, module, found) for name, other in others.items()]


def _twin(
    name: str, other: nn.Module, module: nn.Module, treatment: Treatment
) -> tuple[nn.Module, Treatment]:
    """A module that shares all parameters with another, as the same matrix: with its treatment.

    Their calls are then those of one layer, each by the treatment of the module that was called.

    Raises:
        Unsupported: they share some parameters only, or are of different kinds.
    """
    own, theirs = trained_parameters(module), trained_parameters(other)
    same = own.keys() == theirs.keys() and all(own[key] is theirs[key] for key in own)
    if same and type(other) is type(module) and inlined(module) is None:
        found = checked_treatment(other)
        if (found.parameters, found.layout, found.groups) == (
            treatment.parameters,
            treatment.layout,
            treatment.groups,
        ):
            return other, found
    raise Unsupported(f"it shares a parameter with {name!r}")


def _check_size(selection: Selection, layer: Layer, largest: int) -> None:
    """Leave out a layer with a factor that is too large to be formed unasked."""
    treatment, module = layer.treatment, layer.module
    if sum(parameter.numel() for parameter in own_parameters(module).values()) <= largest:
        return  # no side of [W | b] is longer than all of it
    tied = isinstance(treatment, TiedTreatment)
    if treatment.direct is not None or isinstance(module, nn.Embedding) or tied:
        return  # without factors, or with a diagonal one
    o, i = layer.layout.shape
    sides = {"left": o // treatment.groups, "right": i}
    side = max(sides, key=lambda key: sides[key])
    if sides[side] > largest:
        selection.skip(
            layer.name,
            f"its {side} factor would have {sides[side]}^2 entries: name the layer in layers=... "
            "to treat it all the same",
        )
