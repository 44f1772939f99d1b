"""The scale and shift of normalisation layers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from kfoc.layers.rule import Treatment, extended, treatment, unused


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

    return Treatment(unused, unused, names, layout="stacked", direct=direct)


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
