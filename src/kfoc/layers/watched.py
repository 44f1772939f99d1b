"""Weights that a module without a rule hands to torch by itself: routers, experts in one tensor.

While such a module's forward runs, calls of `linear` and `grouped_mm` are watched for its weights,
or slices of them along a first dimension of experts. What is seen is a layer if `proof` says so:
its rows belong to samples, and it accounts for all of the weight's gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from kfoc.layers.attention import part_name
from kfoc.layers.layer import Layer
from kfoc.layers.linear import linear
from kfoc.layers.rule import trained_parameters

# A use: the weight's name, which of its matrices, the rows of the output, input and output.
Seen = Callable[[str, "int | None", "slice | None", Tensor, Tensor], None]


def watchable(home: str, module: nn.Module) -> dict[str, Layer]:
    """Block name -> a weight of a module that no rule covers and that may be seen in use.

    A single matrix, with a bias perhaps, goes by the module's name, others by their own.
    """
    trained = trained_parameters(module)
    weights = [name for name, parameter in trained.items() if parameter.ndim in (2, 3)]
    found = {}
    for weight in weights:
        parameter = trained[weight]
        if parameter.ndim == 3:
            one = linear(module, weight, "")
            treatment = replace(one, layout="matrices", groups=len(parameter))
        else:
            treatment = linear(module, weight, "bias" if len(weights) == 1 else "")
        alone = len(weights) == 1 and set(treatment.parameters) == set(trained)
        name = home if alone else part_name(home, weight)
        found[name] = Layer(name, home, module, treatment, weight=weight)
    return found


class Watch(TorchFunctionMode):
    """Tells `seen` of every use of some weights, while it is entered."""

    def __init__(self, weights: dict[str, Tensor], seen: Seen) -> None:
        super().__init__()
        self.weights = weights
        self.seen = seen

    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        kind = getattr(func, "__name__", "")
        if kind == "linear" and len(args) > 1:
            self._linear(args[0], args[1], output)
        elif kind in ("grouped_mm", "_grouped_mm") and len(args) > 1:
            offsets = (kwargs or {}).get("offs", args[2] if len(args) > 2 else None)
            self._grouped(args[0], args[1], offsets, output)
        return output

    def _linear(self, value: Any, weight: Any, output: Any) -> None:
        for name, whole in self.weights.items():
            if weight is whole:
                self.seen(name, None, None, value, output)
                return
            matrix = whole.ndim == 3 and weight.shape == whole.shape[1:]
            if matrix and weight._base is whole and weight.stride() == whole.stride()[1:]:
                offset = weight.storage_offset() - whole.storage_offset()
                self.seen(name, offset // whole.stride(0), None, value, output)
                return

    def _grouped(self, value: Any, weight: Any, offsets: Any, output: Any) -> None:
        """Rows sorted by expert, `offsets` the end of each one's."""
        for name, whole in self.weights.items():
            swapped = whole.ndim == 3 and weight._base is whole and weight.ndim == 3
            if not swapped or offsets is None or weight.stride() != whole.mT.stride():
                continue
            if weight.shape != whole.mT.shape or value.ndim != 2:
                continue
            start = 0
            for group, end in enumerate(offsets.tolist()):
                if end > start:
                    self.seen(name, group, slice(start, end), value[start:end], output)
                start = end
            return
