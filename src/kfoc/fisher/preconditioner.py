"""A curvature as the preconditioner of solves with the true Fisher."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from kfoc.curvature.curvature import Curvature, of_layers
from kfoc.curvature.damped import DampedCurvature
from kfoc.parameters.flat import flattened, unflattened
from kfoc.parameters.layout import Layout, covered


@dataclass(frozen=True)
class Preconditioner:
    """An approximate inverse of the damped Fisher, for rows of all its parameters.

    Attributes:
        damped: the blocks that are about them.
        names: parameter name in `damped` -> in the Fisher, where tied ones may go by another.
        layouts: of the rows.
        damping: what the parameters without a block are divided by.
    """

    damped: DampedCurvature
    names: Mapping[str, str]
    layouts: dict[str, Layout]
    damping: float

    @classmethod
    def of(
        cls,
        curvature: Curvature | DampedCurvature,
        model: nn.Module,
        layouts: dict[str, Layout],
        damping: float,
    ) -> Preconditioner:
        """From a curvature of the model, without its blocks that are about other parameters.

        Raises:
            ValueError: it has none about these, or one that is about some of them and others.
        """
        names = aliases(model, covered(layouts))
        kept = _inside(curvature.layouts, names)
        if isinstance(curvature, Curvature):
            damped = of_layers(curvature, kept).damped(damping)
        else:
            damped = of_layers(curvature, kept)
        return cls(damped, names, layouts, damping)

    def __call__(self, rows: Tensor) -> Tensor:
        """Times rows (k, P)."""
        vector = unflattened(rows, self.layouts)
        found = {name: part / self.damping for name, part in vector.items()}
        solved = self.damped.solve(
            {name: vector[self.names[name]] for name in covered(self.damped.layouts)}
        )
        found |= {self.names[name]: part for name, part in solved.items()}
        return flattened(found, self.layouts)

    @property
    def missing(self) -> list[str]:
        """The Fisher's parameters that have no block."""
        have = {self.names[name] for name in covered(self.damped.layouts)}
        return [name for name in covered(self.layouts) if name not in have]


def aliases(model: nn.Module, names: Iterable[str]) -> dict[str, str]:
    """Every name of these parameters -> the one among `names`."""
    known = dict(model.named_parameters(remove_duplicate=False))
    chosen = {id(known[name]): name for name in names}
    return {name: chosen[id(p)] for name, p in known.items() if id(p) in chosen}


def _inside(layouts: Mapping[str, Layout], names: Mapping[str, str]) -> list[str]:
    """The layers that are about these parameters."""
    kept = []
    for layer, layout in layouts.items():
        inside = [name for name in layout.names if name in names]
        if 0 < len(inside) < len(layout.names):
            raise ValueError(
                f"preconditioner: its block of layer {layer!r} is about {', '.join(layout.names)}, "
                f"and the Fisher about {', '.join(inside)} alone: fit it to the same layers, with "
                "the same parameters frozen"
            )
        if inside:
            kept.append(layer)
    if not kept:
        raise ValueError(
            f"preconditioner: none of its layers ({', '.join(layouts)}) has parameters that the "
            "Fisher is about: it must be a curvature of the same model"
        )
    return kept
