"""How much of a model a curvature covers: parameters treated, skipped and frozen, by layer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from torch import nn

from kfoc.parameters.layout import Layout

# Why a layer has no block that the model did not use, as a head that is for other data.
NOT_CALLED = "its forward was never called"


class ParameterCount(NamedTuple):
    """One name of a model's parameter.

    Attributes:
        size: how many numbers it has.
        trained: whether it requires a gradient.
        tied_to: the first name of the same parameter, where it goes by several; "" elsewhere.
    """

    size: int
    trained: bool
    tied_to: str = ""


def parameter_counts(model: nn.Module) -> dict[str, ParameterCount]:
    """Every parameter by name, as in `model.named_parameters(remove_duplicate=False)`."""
    first: dict[int, str] = {}
    counts = {}
    for name, parameter in _named_parameters(model):
        tied = first.setdefault(id(parameter), name)
        counts[name] = ParameterCount(
            parameter.numel(), parameter.requires_grad, "" if tied == name else tied
        )
    return counts


def _named_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """`model.named_parameters(remove_duplicate=False)`, in a fraction of its time."""
    if type(model).named_parameters is not nn.Module.named_parameters:
        yield from model.named_parameters(remove_duplicate=False)
        return
    for prefix, module in model.named_modules(remove_duplicate=False):
        for name, parameter in module._parameters.items():
            if parameter is not None:
                yield f"{prefix}.{name}" if prefix else name, parameter


@dataclass(frozen=True)
class LayerCoverage:
    """One module's own parameters: how many numbers are treated, skipped, frozen, and why."""

    layer: str
    treated: int = 0
    skipped: int = 0
    frozen: int = 0
    reason: str = ""


@dataclass(frozen=True)
class Coverage:
    """Which of a model's parameters a curvature is about; `print` shows it as a table.

    Attributes:
        layers: one entry for every module with parameters of its own, in the model's order. A
            parameter shared by several modules counts where it has its first name.
    """

    layers: tuple[LayerCoverage, ...]

    @property
    def treated(self) -> int:
        """How many parameters (numbers) have a block."""
        return sum(layer.treated for layer in self.layers)

    @property
    def skipped(self) -> int:
        """How many trained parameters have none."""
        return sum(layer.skipped for layer in self.layers)

    @property
    def frozen(self) -> int:
        """How many parameters are not trained, and need none."""
        return sum(layer.frozen for layer in self.layers)

    @property
    def fraction(self) -> float:
        """The part of the trained parameters that is treated, from 0 to 1."""
        trained = self.treated + self.skipped
        return self.treated / trained if trained else 1.0

    def __str__(self) -> str:
        rows: list[tuple[str, ...]] = [("layer", "treated", "skipped", "frozen", "reason")]
        rows += [
            (
                layer.layer or "(the model)",
                *(f"{n:,}" if n else "" for n in (layer.treated, layer.skipped, layer.frozen)),
                layer.reason,
            )
            for layer in self.layers
        ]
        part = f"{self.fraction:.1%} of the trained parameters are treated"
        rows.append(("total", f"{self.treated:,}", f"{self.skipped:,}", f"{self.frozen:,}", part))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return "\n".join(
            "  ".join(
                cell.rjust(width) if column in (1, 2, 3) else cell.ljust(width)
                for column, (cell, width) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
            for row in rows
        )


def coverage(
    counts: Mapping[str, ParameterCount], layouts: Mapping[str, Layout], skipped: Mapping[str, str]
) -> Coverage:
    """Put every parameter into one of three classes.

    Args:
        counts: the model's parameters, from `parameter_counts`.
        layouts: by layer, what its block is about.
        skipped: by layer, why there is no block.
    """
    covered = {
        counts[name].tied_to or name
        for layout in layouts.values()
        for name in layout.names
        if name in counts
    }
    layers: dict[str, LayerCoverage] = {}
    for name, count in counts.items():
        layer = name.rpartition(".")[0]
        before = layers.setdefault(layer, LayerCoverage(layer))
        size = 0 if count.tied_to else count.size
        treated = (count.tied_to or name) in covered
        layers[layer] = LayerCoverage(
            layer,
            before.treated + size * treated,
            before.skipped + size * (count.trained and not treated),
            before.frozen + size * (not count.trained and not treated),
            before.reason or _reason(layer, count, treated, skipped),
        )
    return Coverage(tuple(layers.values()))


def _reason(layer: str, count: ParameterCount, treated: bool, skipped: Mapping[str, str]) -> str:
    """Why a parameter is not counted as treated; "" where it is."""
    if treated and not count.tied_to:
        return ""
    if layer in skipped:
        return skipped[layer]
    if count.tied_to:
        return f"the same parameter as {count.tied_to}"
    return "not among the layers asked for" if count.trained else "frozen (requires_grad is False)"
