"""A last linear layer alone: outputs by its weight have Jacobians that are never formed.

With inputs a (a one appended for the bias), outputs are `W a`, so the Jacobian of output k has a in
row k and zeros elsewhere. In the eigenbasis `kron(U, V)` of a block with eigenvalues l (o, i),

    J B^-1 J^T = U diag_q(sum_j (V^T a)_j^2 / l_qj) U^T .
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional

from kfoc.blocks import DampedBlock
from kfoc.blocks.damped import DampedSpectrum
from kfoc.blocks.spectrum import ProductBasis
from kfoc.common.ambient import callers
from kfoc.model.functional import Forward
from kfoc.parameters.layout import Layout


def factored(block: DampedBlock) -> bool:
    """Whether a block has the eigenbasis that the closed form needs, and an inverse."""
    return (
        isinstance(block, DampedSpectrum)
        and isinstance(block.spectrum.basis, ProductBasis)
        and bool((block.values > 0).all())
    )


def inputs_of_last(
    forward: Forward, layouts: Mapping[str, Layout], inputs: object, count: int
) -> Tensor | None:
    """What the only layer of a curvature is given, (N, T, i), where its outputs are the model's.

    None where they are not seen to be: another kind of layer, outputs that are changed after it,
    or parameters that act on its inputs too.

    Args:
        count: N.
    """
    if len(layouts) != 1:
        return None
    ((layer, layout),) = layouts.items()
    module = dict(forward.model.named_modules()).get(layer)
    prefix = f"{layer}." if layer else ""
    names = (f"{prefix}weight", f"{prefix}bias")
    rows = layout.kind == "rows" and layout.names == names[: len(layout.names)]
    if not isinstance(module, nn.Linear) or not rows:
        return None
    calls: list[tuple[tuple[object, ...], object]] = []
    handle = module.register_forward_hook(lambda _, args, result: calls.append((args, result)))
    try:
        with torch.enable_grad():  # which tells what the layer's parameters act on
            outputs = forward.outputs(inputs, _only(forward.model, layout))
    finally:
        handle.remove()
    given = next((args[0] for args, result in calls if args and result is outputs), None)
    if not isinstance(given, Tensor) or given.requires_grad:
        return None
    # A hook, a forward method of the caller's own or a step in place may make something else of it.
    with callers(), torch.no_grad():
        expected = functional.linear(given, module.weight, module.bias)
    same = expected.shape == outputs.shape and torch.allclose(expected, outputs, 1e-4, 1e-6)
    if given.ndim < 2 or len(given) != count or not same:
        return None
    columns = given.detach().reshape(count, -1, given.shape[-1])
    if len(layout.names) == 2:
        columns = torch.cat([columns, torch.ones_like(columns[..., :1])], -1)
    return columns


def covariance(block: DampedBlock, columns: Tensor) -> Tensor:
    """`J B^-1 J^T`, (N, K, K), from what `inputs_of_last` gave; K is positions times outputs."""
    left, coordinates, inverse = _parts(block, columns)
    if columns.shape[1] == 1:
        weights = (coordinates[:, 0].square() @ inverse.mT)[:, None, None]
    else:
        pairs = coordinates[:, :, None] * coordinates[:, None]  # (N, T, T, i)
        weights = pairs @ inverse.mT
    found = weights.diag_embed() if left is None else (left * weights[..., None, :]) @ left.mT
    size = columns.shape[1] * len(inverse)
    found = found.transpose(2, 3).reshape(-1, size, size)
    return ((found + found.mT) / 2).to(columns)


def variance(block: DampedBlock, columns: Tensor) -> Tensor:
    """The diagonal of `covariance`, (N, K)."""
    left, coordinates, inverse = _parts(block, columns)
    weights = coordinates.square() @ inverse.mT
    found = weights if left is None else weights @ left.square().mT
    return found.flatten(1).to(columns)


def _parts(block: DampedBlock, columns: Tensor) -> tuple[Tensor | None, Tensor, Tensor]:
    """U, `V^T a` and the inverse eigenvalues (o, i), in the block's dtype."""
    assert isinstance(block, DampedSpectrum)
    assert isinstance(block.spectrum.basis, ProductBasis)
    basis = block.spectrum.basis
    columns = columns.to(block.values)
    coordinates = columns if basis.right is None else columns @ basis.right
    return basis.left, coordinates, 1 / block.values


def _only(model: nn.Module, layout: Layout) -> dict[str, Tensor]:
    """All parameters by name, of which those of one layer alone are differentiated by."""
    named = dict(model.named_parameters(remove_duplicate=False))
    own = {id(named[name]) for name in layout.names}
    return {
        name: parameter.detach().requires_grad_(id(parameter) in own)
        for name, parameter in model.named_parameters()
    }
