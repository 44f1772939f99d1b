"""BERT (transformers) as a classifier: batches as a tokeniser gives them, with attention masks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import BatchEncoding, BertConfig, BertForSequenceClassification

from common import Example, Row, report, run, tokens, train


def loss(model: nn.Module, batch: Any) -> Tensor:
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    return cross_entropy(model(**inputs).logits, batch["labels"])


def build(small: bool = False) -> Example:
    torch.manual_seed(0)
    count, length, vocabulary, classes = (6, 5, 11, 3) if small else (64, 64, 512, 4)
    width = 6 if small else 256
    config = BertConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        num_hidden_layers=1 if small else 4,
        num_attention_heads=2 if small else 4,
        intermediate_size=2 * width,
        max_position_embeddings=length,
        num_labels=classes,
    )
    ids, mask = tokens(count, length, vocabulary)
    labels = ids[:, 0] % classes
    size = count // 2 if small else 16
    # The model does not get the labels: kfoc takes them out and forms the loss itself.
    batches = [
        BatchEncoding({"input_ids": i, "attention_mask": m, "labels": y})
        for i, m, y in zip(ids.split(size), mask.split(size), labels.split(size), strict=True)
    ]
    model = train(
        BertForSequenceClassification(config), loss, batches, rate=3e-3 if small else 3e-4
    )
    return Example("BERT", model, batches, loss)


def main(small: bool = False) -> Row:
    return report(build(small))


if __name__ == "__main__":
    run(main, __doc__)
