"""From a module to its samples: one small function a layer family, open to the user's own."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import singledispatch
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from kfoc.samples import Depthwise, Grouped, Inputs, LayerSamples, Patches, Rows, Samples
from kfoc.tokens import OneHot


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
        layout: how the parameters lie in the matrix (see `kfoc.layout.Layout`).
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
    says how the parameters lie in it (`kfoc.layout.Layout`; here, W is the weight transposed).
    Raise `kfoc.Unsupported` with the reason for modules that cannot be treated. Rules are checked
    in every fit: one that does not give autograd's gradients is not used.
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

    return Treatment(no_inputs, no_grads, (name,), layout="stacked", direct=direct)


@treatment.register
def _linear(module: nn.Linear) -> Treatment:
    return linear(module)


def linear(module: nn.Module, weight: str = "weight", bias: str = "bias") -> Treatment:
    """The treatment of a linear map of (N, ..., in) whose parameters have these names."""
    has_bias, parameters = extended(module, weight, bias)
    if parameters == (bias,):
        return replace(bias_alone(bias, channel_first=False), features=(1, 1))
    inputs = _extended_rows if has_bias else _rows
    return Treatment(inputs, _by_position, parameters, features=(1, 1))


def _rows(values: Tensor, constant: float | None = None) -> Inputs:
    if values.ndim < 2:
        raise ValueError(f"its input must be (N, ..., features), found {tuple(values.shape)}")
    return Rows(_by_position(values), constant)


def _extended_rows(values: Tensor) -> Inputs:
    return _rows(values, 1.0)


def _by_position(values: Tensor) -> Tensor:
    """(N, ..., n) to (N, T, n)."""
    shape = values.shape
    return values[:, None] if len(shape) == 2 else values.reshape(shape[0], -1, shape[-1])


@treatment.register
def _bilinear(module: nn.Bilinear) -> Treatment:
    """`y_o = x1^T W_o x2` is linear in the outer product of its two inputs."""

    def value(args: tuple, kwargs: dict) -> Tensor:
        first, second = (*args, *(kwargs[k] for k in ("input1", "input2") if k in kwargs))
        return (first[..., :, None] * second[..., None, :]).flatten(-2)

    return replace(linear(module), value=value)


def _convolution(module: nn.Conv1d | nn.Conv2d | nn.Conv3d) -> Treatment:
    has_bias, parameters = extended(module)
    if parameters == ("bias",):
        return bias_alone("bias", channel_first=True)
    if isinstance(module.padding, str):
        total = [d * (k - 1) for d, k in zip(module.dilation, module.kernel_size, strict=True)]
        if module.padding == "valid":
            total = [0] * len(total)
        # "same" pads the odd pixel at the end, as torch does.
        sides = [(t // 2, t - t // 2) for t in total]
    else:
        sides = [(p, p) for p in module.padding]
    pad = _flat(sides)
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode

    def inputs(values: Tensor) -> Inputs:
        _check_spatial(values, len(sides))
        padded = functional.pad(values, pad, mode=mode) if any(pad) else values
        constant = 1.0 if has_bias else None
        return Patches(padded, module.kernel_size, module.stride, module.dilation, constant)

    return Treatment(inputs, lambda grad: grad.flatten(2).mT, parameters, module.groups)


def _transposed(module: Any) -> Treatment:
    """A transposed convolution as the convolution that it is, of the input with zeros between.

    Its weight, (in, out / groups, *kernel), is about [W | b] with rows of outputs: W is the weight
    with its first two dimensions swapped within each group, and flattened.
    """
    has_bias, parameters = extended(module)
    if parameters == ("bias",):
        return bias_alone("bias", channel_first=True)
    kernel, stride, dilation = module.kernel_size, module.stride, module.dilation
    before = [
        d * (k - 1) - int(p) for d, k, p in zip(dilation, kernel, module.padding, strict=True)
    ]
    pad = _flat([(b, b + extra) for b, extra in zip(before, module.output_padding, strict=True)])

    def inputs(values: Tensor) -> Inputs:
        _check_spatial(values, len(kernel))
        space = [(n - 1) * s + 1 for n, s in zip(values.shape[2:], stride, strict=True)]
        spread = values.new_zeros(*values.shape[:2], *space)
        every: tuple[Any, ...] = (..., *(slice(None, None, s) for s in stride))
        spread[every] = values
        constant = 1.0 if has_bias else None
        ones = (1,) * len(kernel)
        return Patches(functional.pad(spread, pad), kernel, ones, dilation, constant, flipped=True)

    def grads(grad: Tensor) -> Tensor:
        return grad.flatten(2).mT

    return Treatment(inputs, grads, parameters, module.groups, "transposed_convolution")


for _dims in (nn.Conv1d, nn.Conv2d, nn.Conv3d):
    treatment.register(_dims, _convolution)
for _dims_transposed in (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d):
    treatment.register(_dims_transposed, _transposed)


def _affine(module: Any, channel_first: bool, normalised: Callable[[Tensor], Tensor]) -> Treatment:
    """The elementwise scale and shift at the end of a normalisation layer.

    A feature's scale has the gradient `sum_t g x`, its shift `sum_t g`, over the positions t that
    share it; x is the normalised input.
    """
    names = extended(module)[1]
    count = getattr(module, names[0]).numel()

    def direct(value: Tensor, grad: Tensor) -> Tensor:
        each = {"weight": lambda: grad * normalised(value), "bias": lambda: grad}
        columns = []
        for name in names:
            terms = each[name]()
            if channel_first:
                columns.append(terms.flatten(2).sum(2) if terms.ndim > 2 else terms)
            else:
                columns.append(terms.reshape(len(terms), -1, count).sum(1))
        return torch.stack(columns, 2)

    return Treatment(no_inputs, no_grads, names, layout="stacked", direct=direct)


def no_inputs(values: Tensor) -> Inputs:
    raise NotImplementedError("this treatment is direct")


def no_grads(grad: Tensor) -> Tensor:
    raise NotImplementedError("this treatment is direct")


@treatment.register
def _layer_norm(module: nn.LayerNorm) -> Treatment:
    shape, eps = module.normalized_shape, module.eps
    found = _affine(module, False, lambda x: functional.layer_norm(x, shape, eps=eps))
    return replace(found, features=(len(shape), len(shape)))


@treatment.register
def _rms_norm(module: nn.RMSNorm) -> Treatment:
    shape, eps = list(module.normalized_shape), module.eps
    found = _affine(module, False, lambda x: functional.rms_norm(x, shape, eps=eps))
    return replace(found, features=(len(shape), len(shape)))


@treatment.register
def _group_norm(module: nn.GroupNorm) -> Treatment:
    groups, eps = module.num_groups, module.eps
    return _affine(module, True, lambda x: functional.group_norm(x, groups, eps=eps))


@treatment.register
def _batch_norm(module: nn.modules.batchnorm._BatchNorm) -> Treatment:
    """In evaluation mode: by running statistics, so samples are independent (`fit` checks)."""

    def normalised(x: Tensor) -> Tensor:
        # Half precision: x comes as float32 by now, the statistics as they are.
        mean, variance = module.running_mean, module.running_var
        if mean is None or variance is None:  # the batch's own, which `fit` refuses
            return functional.batch_norm(x, None, None, training=True, eps=module.eps)
        return functional.batch_norm(x, mean.to(x), variance.to(x), eps=module.eps)

    return _affine(module, True, normalised)


def _flat(sides: list[tuple[int, int]]) -> list[int]:
    """Padding per axis in the order that `functional.pad` takes: the last axis first."""
    return [amount for pair in reversed(sides) for amount in pair]


def _check_spatial(values: Tensor, dims: int) -> None:
    if values.ndim != 2 + dims:
        raise ValueError(
            f"its input must have {2 + dims} dimensions, samples first, found {tuple(values.shape)}"
        )


def joined(parts: list[tuple[Inputs, Tensor]], groups: int = 1) -> LayerSamples:
    """Samples of a module called several times in one forward: positions side by side, exactly.

    Args:
        parts: per call, the inputs (N, T, i) and the gradients (S, N, T, o).
        groups: how many groups the channels fall into.
    """
    first = parts[0][0]
    if isinstance(first, OneHot):
        tokens = first.with_tensor(torch.cat([part.tensor for part, _ in parts], 1))
        return Samples(tokens, torch.cat([grads for _, grads in parts], 2))
    if groups == 1:
        return Samples.side_by_side(parts)
    calls = tuple((inputs, grads) for inputs, grads in parts if isinstance(inputs, Patches))
    if len(calls) == len(parts) and all(grads.shape[3] == groups for _, grads in calls):
        return Depthwise(calls)
    split = [
        zip(inputs.split(groups), grads.chunk(groups, 3), strict=True)  # type: ignore[attr-defined]
        for inputs, grads in parts
    ]
    each = zip(*split, strict=True)
    return Grouped(tuple(Samples.side_by_side(list(group)) for group in each))
