"""Llama (transformers): no biases, rotary positions, root-mean-square normalisation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM

from common import Example, Row, report, run, tokens, train

IGNORED = -100


def predict(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """The logits at a token are about the next one: the last token's have no label."""
    return model(**inputs).logits[:, :-1]


def loss(model: nn.Module, batch: Any) -> Tensor:
    inputs, labels = batch
    return cross_entropy(predict(model, inputs).mT, labels, ignore_index=IGNORED)


def build(small: bool = False) -> Example:
    torch.manual_seed(0)
    count, length, vocabulary = (6, 5, 11) if small else (64, 128, 512)
    width = 8 if small else 256
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=1 if small else 4,
        num_attention_heads=2 if small else 4,
        num_key_value_heads=1 if small else 2,
        max_position_embeddings=length,
        use_cache=False,
        bos_token_id=0,
        eos_token_id=0,
    )
    ids, mask = tokens(count, length, vocabulary)
    labels = ids.masked_fill(mask == 0, IGNORED)[:, 1:]
    size = count // 2 if small else 8
    batches = [
        ({"input_ids": i, "attention_mask": m}, y)
        for i, m, y in zip(ids.split(size), mask.split(size), labels.split(size), strict=True)
    ]
    model = train(LlamaForCausalLM(config), loss, batches, rate=3e-3 if small else 1e-3)
    return Example("Llama", model, batches, loss, predict=predict)


def main(small: bool = False) -> Row:
    return report(build(small))


if __name__ == "__main__":
    run(main, __doc__)
