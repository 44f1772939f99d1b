"""One layer of a model: the parameters of a block, and how they are treated."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from torch import nn

from kfoc.layers.attention import part_name
from kfoc.layers.rule import Treatment, own_parameters
from kfoc.parameters.layout import Layout


@dataclass(frozen=True)
class Layer:
    """Parameters of a module that have a block, and how the module's calls become samples.

    Attributes:
        name: of the block.
        home: of the module.
        module: that module.
        treatment: of its calls.
        twins: other modules that hold the very same parameters, and the treatments of theirs.
        weight: a parameter whose uses are watched in place of the module's calls, which no rule
            covers; None: the calls are recorded.
    """

    name: str
    home: str
    module: nn.Module
    treatment: Treatment
    twins: tuple[tuple[nn.Module, Treatment], ...] = ()
    weight: str | None = None

    @property
    def whole(self) -> bool:
        """Whether it is all of the module, and not one of several layers there."""
        return self.weight is None and self.name == self.home

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """Those that are treated, by their names in the module."""
        own = own_parameters(self.module)
        return {key: own[key] for key in self.treatment.parameters}

    @cached_property
    def layout(self) -> Layout:
        """Where they lie in the block's matrix."""
        return Layout(
            tuple(part_name(self.home, key) for key in self.treatment.parameters),
            tuple(tuple(parameter.shape) for parameter in self.parameters.values()),
            self.treatment.layout,
            self.treatment.groups,
        )
