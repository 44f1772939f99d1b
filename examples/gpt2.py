"""GPT-2 (transformers): a label for every token, padding left out, embedding and head tied."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import GPT2Config, GPT2LMHeadModel

from common import Example, Row, report, run, tokens, train

IGNORED = -100  # as in nn.CrossEntropyLoss: such positions have no influence


def predict(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """The logits at a token are about the next one: the last token's have no label."""
    return model(**inputs).logits[:, :-1]


def loss(model: nn.Module, batch: Any) -> Tensor:
    inputs, labels = batch
    return cross_entropy(predict(model, inputs).mT, labels, ignore_index=IGNORED)


def build(small: bool = False) -> Example:
    torch.manual_seed(0)
    count, length, vocabulary = (6, 5, 11) if small else (64, 128, 512)
    config = GPT2Config(
        vocab_size=vocabulary,
        n_positions=length,
        n_embd=6 if small else 256,
        n_layer=1 if small else 4,
        n_head=2 if small else 4,
        use_cache=False,
        bos_token_id=0,
        eos_token_id=0,
    )
    ids, mask = tokens(count, length, vocabulary)
    # Labels are compared with the outputs as they stand, so the shift by one is made here.
    labels = ids.masked_fill(mask == 0, IGNORED)[:, 1:]
    size = count // 2 if small else 8
    batches = [
        ({"input_ids": i, "attention_mask": m}, y)
        for i, m, y in zip(ids.split(size), mask.split(size), labels.split(size), strict=True)
    ]
    model = train(GPT2LMHeadModel(config), loss, batches, rate=3e-3 if small else 1e-3)
    return Example("GPT-2", model, batches, loss, predict=predict)


def main(small: bool = False) -> Row:
    return report(build(small))


if __name__ == "__main__":
    run(main, __doc__)
