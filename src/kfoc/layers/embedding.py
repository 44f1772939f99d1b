"""Embeddings."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kfoc.layers.rule import Refused, Treatment, Unsupported, treatment
from kfoc.samples.inputs import Inputs
from kfoc.samples.one_hot import OneHot


@treatment.register
def _embedding(module: nn.Embedding) -> Treatment:
    """`y = weight[token]`, as the linear map `weight^T` of one-hot rows.

    Positions of `padding_idx` get zero rows, as they do not train the weight; in K-FAC's mean of
    the output gradients they count like any other position without an input.
    """
    if module.max_norm is not None:
        raise Unsupported("its max_norm changes the weight in the forward pass")
    if module.scale_grad_by_freq:
        raise Refused("its scale_grad_by_freq makes gradients differ from the derivative")
    if not module.weight.requires_grad:
        raise Unsupported("its weight is frozen (requires_grad is False)")
    size, padding, dtype = module.num_embeddings, module.padding_idx, module.weight.dtype
    # As all factors, in float32 at least.
    dtype = torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype

    def inputs(values: Tensor) -> Inputs:
        if not values.ndim:
            raise ValueError("its input must be (N, ...), found a scalar")
        tokens = values.reshape(len(values), -1)
        if padding is not None:
            tokens = tokens.masked_fill(tokens == padding, -1)
        return OneHot(tokens, size, dtype)

    def grads(grad: Tensor) -> Tensor:
        return grad.reshape(len(grad), -1, grad.shape[-1])

    return Treatment(inputs, grads, ("weight",), layout="columns", features=(0, 1))


@treatment.register
def _embedding_bag(module: nn.EmbeddingBag) -> Treatment:
    raise Unsupported("bags have no position of their own: use an Embedding and sum its outputs")
