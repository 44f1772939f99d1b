"""Mixtures of experts (transformers): Mixtral and Qwen2-MoE, whose experts lie in one tensor each.

Every expert has a Kronecker product of its own, of the tokens that were sent to it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import MixtralConfig, MixtralForCausalLM, Qwen2MoeConfig, Qwen2MoeForCausalLM

from common import Example, Row, report, run, tokens, train

IGNORED = -100


def predict(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """The logits at a token are about the next one: the last token's have no label."""
    return model(**inputs).logits[:, :-1]


def loss(model: nn.Module, batch: Any) -> Tensor:
    inputs, labels = batch
    return cross_entropy(predict(model, inputs).mT, labels, ignore_index=IGNORED)


def network(name: str, small: bool, vocabulary: int, length: int) -> nn.Module:
    width = 8 if small else 128
    shape = {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": 1 if small else 2,
        "num_attention_heads": 2 if small else 4,
        "num_key_value_heads": 1 if small else 2,
        "max_position_embeddings": length,
        "num_experts_per_tok": 2,
        "use_cache": False,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    experts = 3 if small else 8
    if name == "Mixtral":
        model: Any = MixtralForCausalLM(MixtralConfig(num_local_experts=experts, **shape))
    else:
        sizes = {"moe_intermediate_size": width, "shared_expert_intermediate_size": width}
        model = Qwen2MoeForCausalLM(Qwen2MoeConfig(num_experts=experts, **sizes, **shape))
    if model.dtype == torch.float64:  # which their fast experts have no kernel for
        model.set_experts_implementation("eager")
    return model


def build(small: bool = False, name: str = "Mixtral", dtype: torch.dtype | None = None) -> Example:
    torch.manual_seed(0)
    count, length, vocabulary = (6, 5, 11) if small else (64, 64, 256)
    ids, mask = tokens(count, length, vocabulary)
    labels = ids.masked_fill(mask == 0, IGNORED)[:, 1:]
    size = count // 2 if small else 8
    batches = [
        ({"input_ids": i, "attention_mask": m}, y)
        for i, m, y in zip(ids.split(size), mask.split(size), labels.split(size), strict=True)
    ]
    model = train(network(name, small, vocabulary, length), loss, batches)
    title = name if dtype is None else f"{name}, {str(dtype).rpartition('.')[2]}"
    return Example(title, model.to(dtype), batches, loss, predict=predict)


def main(small: bool = False) -> list[Row]:
    kinds = [(name, dtype) for name in ("Mixtral", "Qwen2-MoE") for dtype in (None, torch.bfloat16)]
    return [report(build(small, name, dtype)) for name, dtype in kinds]


if __name__ == "__main__":
    run(main, __doc__)
