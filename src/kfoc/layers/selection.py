"""Which of a model's layers are treated, and why the others are not, as a fit finds out."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from torch import nn

from kfoc.layers.attention import Inlined, part_name
from kfoc.layers.layer import Layer
from kfoc.layers.rule import trained_parameters
from kfoc.parameters.layout import Layout

# Parameters that no treatment covers get per-sample gradients one by one, up to so many in all:
# a batch of N samples holds N numbers for each of them.
LOOSE_LIMIT = 2**16


@dataclass
class Selection:
    """Which layers are treated, which are not and why, and which were asked for by name.

    Attributes:
        every: all of the model's modules by name.
        candidates: those with parameters of their own, in the model's order.
        layers: those that are treated.
        watched: those that may turn out to be layers, by their names as such.
        inlined: modules that use their parts' parameters by themselves, where a part is treated.
        loose: block name -> parameters, by full name, that get per-sample gradients one by one.
        skipped: name -> the reason.
        named: those that were asked for by name.
    """

    every: dict[str, nn.Module] = field(default_factory=dict)
    candidates: dict[str, nn.Module] = field(default_factory=dict)
    layers: dict[str, Layer] = field(default_factory=dict)
    watched: dict[str, Layer] = field(default_factory=dict)
    inlined: dict[str, Inlined] = field(default_factory=dict)
    loose: dict[str, dict[str, nn.Parameter]] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    named: set[str] = field(default_factory=set)

    @property
    def blocks(self) -> list[str]:
        """The names of all blocks, in the model's order."""
        order = {name: number for number, name in enumerate(self.candidates)}
        homes = {name: layer.home for name, layer in self.layers.items()}

        def place(name: str) -> int:
            return order.get(homes.get(name, name), len(order))

        return sorted([*self.layers, *self.loose], key=place)

    def layer(self, name: str) -> Layer:
        """A layer that is treated, or may turn out to be one."""
        return self.layers[name] if name in self.layers else self.watched[name]

    def of_module(self, home: str) -> list[Layer]:
        """A module's layers, of which it has more than one where its parameters are."""
        return [layer for layer in self.layers.values() if layer.home == home]

    def layout(self, name: str) -> Layout:
        """Where a block's parameters lie in its matrix."""
        if name in self.layers or name in self.watched:
            return self.layer(name).layout
        parameters = self.loose[name]
        shapes = tuple(tuple(parameter.shape) for parameter in parameters.values())
        return Layout(tuple(parameters), shapes, "flat")

    def drop(self, name: str, reason: str) -> None:
        """Leave a layer without treatment: its parameters become loose where they are few enough.

        Raises:
            ValueError: they are not, and the layer was asked for by name.
        """
        layer = self.layers.pop(name, None)
        if layer is None or layer.whole:
            trained, home = trained_parameters(self.candidates[name]), name
        else:
            trained, home = layer.parameters, layer.home
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
        twins = {layer.name: layer.parameters for layer in self.layers.values() if layer.twins}
        return {id(p): block for block, each in (self.loose | twins).items() for p in each.values()}

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
            layer = self.layers[name] = self.watched.pop(name)
            homes.setdefault(layer.home, set()).update(layer.treatment.parameters)
        for home, covered in homes.items():
            self.loose.pop(home, None)
            reason = self.skipped.pop(home, "not covered by another block")
            trained = trained_parameters(self.candidates[home])
            rest = {part_name(home, key): p for key, p in trained.items() if key not in covered}
            if rest:
                self.loosen(home, rest, reason)

    def settle(self) -> None:
        """No more weights are watched but those of layers. Raises ValueError as `skip` does."""
        homes = {each.home for each in self.watched.values()}
        self.watched.clear()
        for home in homes & self.skipped.keys():
            self.skip(home, self.skipped[home])

    def skip(self, name: str, reason: str) -> None:
        """Leave a layer out. Raises ValueError where it was asked for by name."""
        watched = [*self.watched.values(), *(each for each in self.layers.values() if each.weight)]
        awaiting = any(layer.home == name for layer in watched)
        if name in self.named and not awaiting:
            raise ValueError(f"layer {name!r} cannot be treated: {reason}")
        self.layers.pop(name, None)
        self.loose.pop(name, None)
        self.skipped[name] = reason
