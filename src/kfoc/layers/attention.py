"""Attention that uses its projections' parameters by itself, recomputed so that they can be seen.

`nn.MultiheadAttention` hands the parameters of its projections, and those of its child `out_proj`,
to one function; no hook sees what goes in and out of them. Its forward hook here computes the same
output by steps that can be watched, and puts it in the place of the module's own: same parameters,
same result to rounding, which is checked. So its projections become layers like any other.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from kfoc.layers.linear import linear
from kfoc.layers.rule import Treatment, Unsupported, treatment

# Called for every projection: its part's name ("" for in_proj), the group of its outputs or None
# where there are none, its input, samples first, and its output.
Watch = Callable[[str, "int | None", Tensor, Tensor], None]


class Inlined(NamedTuple):
    """A module that uses its parts' parameters without calling them.

    Attributes:
        module: the module.
        parts: names of its parts below it ("": its own parameters).
        replay: (args, kwargs, watch) of one call to the module's output, by steps that `watch` is
            told of. Raises Unsupported for calls that cannot be replayed.
    """

    module: nn.Module
    parts: tuple[str, ...]
    replay: Callable[[tuple, dict, Watch], Any]


def part_name(module: str, part: str) -> str:
    """The full name of a part, from its module's."""
    return ".".join(filter(None, (module, part)))


def inlined(module: nn.Module) -> Inlined | None:
    """How a module is replayed, or None for modules that need none, or cannot be."""
    if type(module).forward is not nn.MultiheadAttention.forward:
        return None
    attention: Any = module
    if attention.in_proj_weight is None or attention.bias_k is not None or attention.add_zero_attn:
        return None

    def replay(args: tuple, kwargs: dict, watch: Watch) -> Any:
        return _attention(attention, watch, *args, **kwargs)

    return Inlined(module, ("", "out_proj"), replay)


@treatment.register
def _in_projection(module: nn.MultiheadAttention) -> Treatment:
    """The three projections, one above the other: (3 E, E + 1)."""
    if module.in_proj_weight is None:
        raise Unsupported("its queries, keys and values have different sizes (kdim, vdim)")
    if module.bias_k is not None or module.add_zero_attn:
        raise Unsupported("it adds keys and values of its own (add_bias_kv, add_zero_attn)")
    return linear(module, "in_proj_weight", "in_proj_bias")


def _attention(
    module: Any,
    watch: Watch,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """The forward of `nn.MultiheadAttention`, with its signature."""
    if query.ndim != 3:
        raise Unsupported(f"its query must be a batch, with 3 dimensions, found {query.ndim}")
    if module.training and module.dropout:
        raise Unsupported("it draws dropout masks: call model.eval(), or set its dropout to 0")
    q, k, v = (_heads(x, module.num_heads) for x in _projected(module, watch, query, key, value))
    mask = _mask(attn_mask, key_padding_mask, q, k)
    weights = None
    if need_weights:
        scores = q @ k.mT / q.shape[-1] ** 0.5
        weights = torch.softmax(scores if mask is None else scores + mask, -1)
        mixed = weights @ v
        weights = weights.mean(1) if average_attn_weights else weights
    else:
        mixed = functional.scaled_dot_product_attention(q, k, v, mask)
    mixed = mixed.transpose(1, 2).flatten(2)
    out = functional.linear(mixed, module.out_proj.weight, module.out_proj.bias)
    watch("out_proj", None, mixed, out)
    return (out if module.batch_first else out.transpose(0, 1)), weights


def _projected(module: Any, watch: Watch, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Queries, keys and values, (N, T, E) each."""
    weight, bias = module.in_proj_weight, module.in_proj_bias
    query, key, value = (x if module.batch_first else x.transpose(0, 1) for x in tensors)
    if tensors[0] is tensors[1] is tensors[2]:
        projected = functional.linear(query, weight, bias)
        watch("", None, query, projected)
        return projected.chunk(3, -1)
    found = []
    size = module.embed_dim
    for group, x in enumerate((query, key, value)):
        rows = slice(group * size, (group + 1) * size)
        part = functional.linear(x, weight[rows], None if bias is None else bias[rows])
        watch("", group, x, part)
        found.append(part)
    return tuple(found)


def _heads(x: Tensor, count: int) -> Tensor:
    """(N, T, E) to (N, heads, T, E / heads)."""
    return x.unflatten(-1, (count, -1)).transpose(1, 2)


def _mask(attn: Tensor | None, padding: Tensor | None, q: Tensor, k: Tensor) -> Tensor | None:
    """What is added to the scores, (N or 1, heads or 1, L, S).

    `attn` comes as (L, S) or (N * heads, L, S).
    """
    mask = None
    if attn is not None:
        attn = _additive(attn, q)
        mask = attn[None, None] if attn.ndim == 2 else attn.unflatten(0, (len(q), -1))
    if padding is not None:
        added = _additive(padding, k)[:, None, None, :]
        mask = added if mask is None else mask + added
    return mask


def _additive(mask: Tensor, like: Tensor) -> Tensor:
    """A mask that says True where to look away, as zeros and minus infinities."""
    if mask.dtype is not torch.bool:
        return mask.to(like.dtype)
    return like.new_zeros(mask.shape).masked_fill(mask, float("-inf"))
