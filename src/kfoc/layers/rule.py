"""From a module to its samples: one small function a layer family, open to the user's own."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable
from dataclasses import dataclass
from functools import singledispatch
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from kfoc.samples.inputs import Inputs


class Unsupported(Exception):  # noqa: N818  (a reason, not a failure)
    """Why a layer cannot be treated exactly; the message ends up in `Curvature.skipped`."""


class Refused(Unsupported):
    """Unsupported, and nothing else gives the right numbers: frozen, or with other gradients."""


def first_argument(args: tuple, kwargs: dict) -> Any:
    """The input of a module that is called as torch's are."""
    return args[0] if args else kwargs.get("input")


@dataclass(frozen=True)
class Treatment:
    """How one module becomes samples.

    Attributes:
        inputs: the module's input in one call, (N, ...), to a's of shape (N, T, i).
        grads: a derivative by the module's output in one call, (N, ...), to g's (N, T, o).
        parameters: the names of the module's parameters that make up `[W | b]`.
        groups: how many groups the channels of inputs and outputs fall into.
        layout: how the parameters lie in the matrix (see `kfoc.parameters.layout.Layout`).
        direct: for layers that are not linear maps of patches or positions, in place of `inputs`
            and `grads`: (input, derivative by the output) of one call to X, (N, o, i).
        value: the arguments of one call, (args, kwargs), to what the above take as its input.
        features: how many trailing dimensions of input and output belong to one row, for layers
            that treat all rows alike, whatever their leading dimensions mean. None: the first
            dimension alone counts rows, as for a convolution.
    """

    inputs: Callable[[Tensor], Inputs]
    grads: Callable[[Tensor], Tensor]
    parameters: tuple[str, ...]
    groups: int = 1
    layout: str = "rows"
    direct: Callable[[Tensor, Tensor], Tensor] | None = None
    value: Callable[[tuple, dict], Any] = first_argument
    features: tuple[int, int] | None = None

    def leading(self, value: Tensor, output_shape: torch.Size) -> int:
        """How many leading dimensions, the same in input and output, count rows in a call."""
        if self.features is None:
            return 1
        inside, outside = self.features
        lead = value.ndim - inside
        same = lead == len(output_shape) - outside and value.shape[:lead] == output_shape[:lead]
        return lead if same else 1


# Rules of classes in libraries that are not imported for it: a pattern of their qualified names ->
# the rule.
BY_NAME: dict[str, Callable[[Any], Treatment]] = {}


@singledispatch
def treatment(module: nn.Module) -> Treatment:
    """The treatment of a module. Raises Unsupported with the reason where there is none."""
    raise Unsupported(f"no treatment for {type(module).__name__} layers")


def register(family: type[nn.Module]) -> Callable[[Callable[[Any], Treatment]], Any]:
    """Say how a module class of your own is treated: a decorator for `module -> Treatment`.

    A linear layer with its inputs first, for example:

        @kfoc.register(InFirst)
        def treat(module):
            def inputs(values):  # (N, ..., in) -> (N, T, in), and a column of ones for the bias
                rows = values.reshape(len(values), -1, values.shape[-1])
                return kfoc.Rows(rows, constant=1.0)

            def grads(grad):  # (N, ..., out) -> (N, T, out)
                return grad.reshape(len(grad), -1, grad.shape[-1])

            return kfoc.Treatment(inputs, grads, ("weight", "bias"), layout="columns")

    The block is then about the matrix `[W | b]` that maps a row of `inputs` to an output; `layout`
    says how the parameters lie in it (`kfoc.parameters.layout.Layout`; here, W is the weight
    transposed). Raise `kfoc.Unsupported` with the reason for modules that cannot be treated. Rules
    are checked in every fit: one that does not give autograd's gradients is not used.
    """
    return treatment.register(family)


def checked_treatment(module: nn.Module) -> Treatment:
    """The treatment of a module by its class, or the nearest one above it that has a rule.

    What a subclass computes may be something else: whether the rule holds is seen by `proof`.
    """
    kind, registered = type(module), treatment.registry
    if kind not in registered:
        for cls in kind.__mro__:
            name = f"{cls.__module__}.{cls.__qualname__}"
            known = next((r for p, r in BY_NAME.items() if fnmatch.fnmatchcase(name, p)), None)
            if known is not None and cls not in registered:
                treatment.register(cls, known)
    rule = treatment.dispatch(kind)
    own = own_parameters(module)
    if not any(parameter.requires_grad for parameter in own.values()):
        raise Refused("its parameters are frozen (requires_grad is False)")
    found = rule(module)
    missing = [name for name in found.parameters if name not in own]
    if missing:
        raise Unsupported(f"its {missing[0]} is not a parameter of its own (reparametrised?)")
    return found


def has_rule(module: nn.Module) -> bool:
    """Whether there is a rule for a module's class, or for one above it."""
    return treatment.dispatch(type(module)) is not treatment.dispatch(object)


def extended(
    module: nn.Module, weight: str = "weight", bias: str = "bias"
) -> tuple[bool, tuple[str, ...]]:
    """Whether [W | b] has a bias column, and its parameters: the trained ones alone."""
    trained = trained_parameters(module)
    return bias in trained, tuple(name for name in (weight, bias) if name in trained)


def trained_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """A module's own parameters that are not frozen, by name."""
    own = own_parameters(module)
    return {name: parameter for name, parameter in own.items() if parameter.requires_grad}


def own_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """`named_parameters(recurse=False)`, which takes ten times as long to go through them."""
    if type(module).named_parameters is not nn.Module.named_parameters:
        return dict(module.named_parameters(recurse=False))
    named = module._parameters.items()
    found = {name: parameter for name, parameter in named if parameter is not None}
    if len(found) == len({id(parameter) for parameter in found.values()}):
        return found
    first = {id(parameter): name for name, parameter in reversed(found.items())}
    return {name: parameter for name, parameter in found.items() if first[id(parameter)] == name}


def bias_alone(name: str, channel_first: bool) -> Treatment:
    """A layer of which the bias alone is trained: its gradient is the sum over positions of g."""

    def direct(value: Tensor, grad: Tensor) -> Tensor:
        if not channel_first:
            grad = grad.movedim(-1, 1)
        return (grad.flatten(2).sum(2) if grad.ndim > 2 else grad)[..., None]

    return Treatment(unused, unused, (name,), layout="stacked", direct=direct)


def unused(values: Tensor) -> NoReturn:
    """Stands for `inputs` and `grads` of treatments that are direct."""
    raise NotImplementedError("this treatment is direct")
