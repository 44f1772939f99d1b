"""Which of a model's layers are treated, and why the others are not."""

from __future__ import annotations

import fnmatch
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field

from torch import nn

from kfoc.layers.attention import Inlined, inlined, part_name
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
from kfoc.layers.tied import TiedTreatment, tied_treatment
from kfoc.layers.watched import Watched, watchable
from kfoc.parameters.layout import Layout

# Parameters that no treatment covers get per-sample gradients one by one, up to so many in all:
# a batch of N samples holds N numbers for each of them.
LOOSE_LIMIT = 2**16

# What a name must have to match as a pattern.
_WILD = frozenset("*?[")


@dataclass
class Selection:
    """Which layers are treated and how, which are not and why, and which were asked for by name.

    Attributes:
        every: all of the model's modules by name.
        candidates: those with parameters of their own, in the model's order.
        modules: those that are treated.
        treatments: how.
        inlined: modules that use their parts' parameters by themselves, where a part is treated.
        twins: treated layer -> the other modules that hold the very same parameters, and theirs.
        loose: block name -> parameters, by full name, that get per-sample gradients one by one.
        watched: weights that may turn out to be a layer's, or have: name of that layer -> which.
        skipped: name -> the reason.
        named: those that were asked for by name.
        homes: parameter that is a layer of its own -> its module's name.
    """

    every: dict[str, nn.Module] = field(default_factory=dict)
    candidates: dict[str, nn.Module] = field(default_factory=dict)
    modules: dict[str, nn.Module] = field(default_factory=dict)
    treatments: dict[str, Treatment] = field(default_factory=dict)
    inlined: dict[str, Inlined] = field(default_factory=dict)
    twins: dict[str, list[tuple[nn.Module, Treatment]]] = field(default_factory=dict)
    loose: dict[str, dict[str, nn.Parameter]] = field(default_factory=dict)
    watched: dict[str, Watched] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    named: set[str] = field(default_factory=set)
    homes: dict[str, str] = field(default_factory=dict)

    @property
    def blocks(self) -> list[str]:
        """The names of all blocks, in the model's order."""
        order = {name: number for number, name in enumerate(self.candidates)}
        homes = self.homes | {name: each.home for name, each in self.watched.items()}

        def place(name: str) -> int:
            return order.get(homes.get(name, name), len(order))

        return sorted([*self.modules, *self.loose], key=place)

    def layer_parameters(self, name: str) -> dict[str, nn.Parameter]:
        """A treated layer's treated parameters, by their names in the module."""
        _, module, treatment = self._layer(name)
        own = own_parameters(module)
        return {key: own[key] for key in treatment.parameters}

    def _layer(self, name: str) -> tuple[str, nn.Module, Treatment]:
        """The name of a layer's module, the module, and its treatment."""
        if name in self.watched:
            each = self.watched[name]
            return each.home, each.module, each.treatment
        return self.homes.get(name, name), self.modules[name], self.treatments[name]

    def of_module(self, home: str) -> dict[str, Treatment]:
        """A module's layers, of which it has more than one where its parameters are, and how."""
        return {n: each for n, each in self.treatments.items() if self.homes.get(n, n) == home}

    def layout(self, name: str) -> Layout:
        """Where a block's parameters lie in its matrix."""
        if name in self.loose and name not in self.watched:
            parameters = self.loose[name]
            shapes = tuple(tuple(parameter.shape) for parameter in parameters.values())
            return Layout(tuple(parameters), shapes, "flat")
        home, module, treatment = self._layer(name)
        own = own_parameters(module)
        return Layout(
            tuple(part_name(home, parameter) for parameter in treatment.parameters),
            tuple(tuple(own[parameter].shape) for parameter in treatment.parameters),
            treatment.layout,
            treatment.groups,
        )

    def drop(self, name: str, reason: str) -> None:
        """Leave a layer without treatment: its parameters become loose where they are few enough.

        Raises:
            ValueError: they are not, and the layer was asked for by name.
        """
        if name in self.modules and (name in self.watched or name in self.homes):
            trained, home = self.layer_parameters(name), self._layer(name)[0]
            self.watched.pop(name, None)
        else:
            trained, home = trained_parameters(self.candidates[name]), name
        for kept in (self.modules, self.treatments, self.twins):
            kept.pop(name, None)
        held = self.held()
        own = {part_name(home, key): p for key, p in trained.items() if id(p) not in held}
        if own:
            self.loosen(name, own, reason)
        else:
            self.cover(name, {held[id(parameter)] for parameter in trained.values()})

    def cover(self, name: str, blocks: Iterable[str]) -> None:
        """A layer without a block of its own, all of whose parameters are in other blocks."""
        where = ", ".join(map(repr, sorted(blocks)))
        self.skipped[name] = f"its parameters are in the block of {where}"

    def held(self) -> dict[int, str]:
        """Identity of a parameter that is loose, or of several modules treated as one -> block."""
        blocks = self.loose | {name: self.layer_parameters(name) for name in self.twins}
        return {id(p): block for block, each in blocks.items() for p in each.values()}

    def loosen(self, block: str, parameters: dict[str, nn.Parameter], reason: str) -> None:
        """Give parameters a block of their own, from per-sample gradients one by one."""
        count = sum(parameter.numel() for parameter in parameters.values())
        taken = sum(p.numel() for each in self.loose.values() for p in each.values())
        if taken + count <= LOOSE_LIMIT:
            self.loose[block] = parameters
            return
        self.skip(
            block,
            f"{reason} (and its {count} parameters are too many for per-sample gradients one by "
            f"one: at most {LOOSE_LIMIT} in all)",
        )

    def promote(self, names: Iterable[str]) -> None:
        """Watched weights that turned out to be layers have blocks of their own from now on."""
        homes: dict[str, set[str]] = {}
        names = set(names)
        for name in [name for name in self.watched if name in names]:
            each = self.watched[name]
            self.modules[name], self.treatments[name] = each.module, each.treatment
            homes.setdefault(each.home, set()).update(each.treatment.parameters)
        for home, covered in homes.items():
            self.loose.pop(home, None)
            reason = self.skipped.pop(home, "not covered by another block")
            trained = trained_parameters(self.candidates[home])
            rest = {part_name(home, key): p for key, p in trained.items() if key not in covered}
            if rest:
                self.loosen(home, rest, reason)

    def settle(self) -> None:
        """No more weights are watched but those of layers. Raises ValueError as `skip` does."""
        homes = {each.home for name, each in self.watched.items() if name not in self.modules}
        self.unwatch()
        for home in homes & self.skipped.keys():
            self.skip(home, self.skipped[home])

    def unwatch(self) -> None:
        """Forget the weights that were watched and are no layers."""
        for name in self.watched.keys() - self.modules.keys():
            del self.watched[name]

    def skip(self, name: str, reason: str) -> None:
        """Leave a layer out. Raises ValueError where it was asked for by name."""
        awaiting = any(each.home == name for each in self.watched.values())
        if name in self.named and not awaiting:
            raise ValueError(f"layer {name!r} cannot be treated: {reason}")
        self.modules.pop(name, None)
        self.treatments.pop(name, None)
        self.loose.pop(name, None)
        self.twins.pop(name, None)
        self.skipped[name] = reason


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
    for name in [name for name in selection.treatments if name not in selection.named]:
        if largest is not None:
            _check_size(selection, name, largest)
    if not selection.blocks and not selection.watched:
        raise ValueError(f"no layer can be treated: {selection.skipped or 'no parameters'}")
    for name, module in every.items():
        whole = inlined(module)
        if whole is None:
            continue
        if any(selection.of_module(part_name(name, part)) for part in whole.parts):
            selection.inlined[name] = whole
    return selection


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
        selection.treatments[name], selection.modules[name] = found, module
        if twins:
            selection.twins[name] = twins
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
        selection.treatments[name], selection.modules[name] = found, module
        selection.homes[name] = home
        if twins:
            selection.twins[name] = [(other, part_of(each, key)) for other, each in twins]


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


def _check_size(selection: Selection, name: str, largest: int) -> None:
    """Leave out a layer with a factor that is too large to be formed unasked."""
    treatment, module = selection.treatments[name], selection.modules[name]
    if sum(parameter.numel() for parameter in own_parameters(module).values()) <= largest:
        return  # no side of [W | b] is longer than all of it
    tied = isinstance(treatment, TiedTreatment)
    if treatment.direct is not None or isinstance(module, nn.Embedding) or tied:
        return  # without factors, or with a diagonal one
    o, i = selection.layout(name).shape
    sides = {"left": o // treatment.groups, "right": i}
    side = max(sides, key=lambda key: sides[key])
    if sides[side] > largest:
        selection.skip(
            name,
            f"its {side} factor would have {sides[side]}^2 entries: name the layer in layers=... "
            "to treat it all the same",
        )
