"""A model's curvature: one block per layer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from kfoc.blocks import Block
from kfoc.coverage import Coverage, ParameterCount, coverage
from kfoc.layout import Layout


@dataclass(frozen=True, repr=False)
class Curvature(Mapping[str, Block]):
    """Layer name -> block of the mean Fisher, in the order of the model's modules.

    Attributes:
        blocks: the blocks by layer name, as in `model.named_modules()`.
        num_samples: how many samples the mean is over: `num_samples * block` is the sum.
        layouts: layer name -> the parameters that its block is about, and where they lie in the
            matrix `[W | b]`.
        skipped: name of a layer with parameters that has no block -> the reason.
        counts: every parameter of the model, by name: its size, and whether it is trained.
    """

    blocks: dict[str, Block]
    num_samples: int
    layouts: dict[str, Layout]
    skipped: dict[str, str]
    counts: dict[str, ParameterCount] = field(default_factory=dict)

    @property
    def coverage(self) -> Coverage:
        """How many of the model's parameters are treated, skipped and frozen, by layer."""
        return coverage(self.counts, self.layouts, self.skipped)

    @property
    def layers(self) -> tuple[str, ...]:
        """The names of the layers that have a block."""
        return tuple(self.blocks)

    @property
    def parameters(self) -> dict[str, tuple[str, ...]]:
        """Layer name -> the names of the parameters that its block is about."""
        return {layer: layout.names for layer, layout in self.layouts.items()}

    def __getitem__(self, layer: str) -> Block:
        try:
            return self.blocks[layer]
        except KeyError:
            reason = self.skipped.get(layer)
            known = f"it was skipped: {reason}" if reason else f"there are {list(self.blocks)}"
            raise KeyError(f"no block for layer {layer!r}; {known}") from None

    def __iter__(self) -> Iterator[str]:
        return iter(self.blocks)

    def __len__(self) -> int:
        return len(self.blocks)

    def __repr__(self) -> str:
        lines = [f"Curvature of {len(self)} layers over {self.num_samples} samples"]
        for name, block in self.blocks.items():
            o, i = block.shape
            error = block.relative_error
            known = "" if error is None else f"  relative error {error:.4f}"
            lines.append(f"  {name or '(the model)'}: {type(block).__name__} {o} x {i}{known}")
        lines += [
            f"  {name or '(the model)'}: skipped, {why}" for name, why in self.skipped.items()
        ]
        return "\n".join(lines)
