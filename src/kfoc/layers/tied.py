"""The weight that an embedding shares with the model's linear head."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kfoc.layers.rule import Treatment, Unsupported, checked_treatment
from kfoc.samples import one_hot as vocabularies
from kfoc.samples.inputs import Inputs, Rows
from kfoc.samples.linear import Samples
from kfoc.samples.one_hot import OneHot
from kfoc.samples.tied import Tied


@dataclass(frozen=True, kw_only=True)
class TiedTreatment(Treatment):
    """How the two modules that share a weight become samples; calls tell by their inputs which."""

    head: Treatment
    embedding: Treatment


def tied_treatment(first: nn.Module, second: nn.Module) -> TiedTreatment:
    """The treatment of an embedding and a linear layer, in any order, with the same weight.

    Raises:
        Unsupported: modules of other kinds, or a bias.
    """
    embedding, head = (first, second) if isinstance(first, nn.Embedding) else (second, first)
    if not isinstance(embedding, nn.Embedding) or not isinstance(head, nn.Linear):
        raise Unsupported(
            "of layers that share a weight, an Embedding with a Linear head alone is treated, "
            f"found {type(first).__name__} and {type(second).__name__}"
        )
    parts = checked_treatment(embedding), checked_treatment(head)
    if len(parts[1].parameters) > 1:
        raise Unsupported("the linear layer with the same weight has a bias of its own")
    # A large vocabulary is the side of the diagonal factor, the right one.
    large = len(embedding.weight) > vocabularies.FULL_VOCABULARY
    whole = parts[1]

    def inputs(values: Tensor) -> Inputs:
        return parts[int(values.is_floating_point())].inputs(values)

    return TiedTreatment(
        inputs,
        whole.grads,
        whole.parameters,
        layout="columns" if large else "rows",
        head=whole,
        embedding=parts[0],
    )


def tied_samples(head: Samples | None, embedding: Samples | None) -> Tied:
    """The samples of both uses; None for one that was not called in this batch."""
    if head is None:
        if embedding is None:
            raise ValueError("neither the embedding nor the head was called")
        width, size = embedding.shape
        grads = embedding.grads.new_zeros(*embedding.grads.shape[:2], 0, size)
        head = Samples(Rows(grads.new_zeros(embedding.num_samples, 0, width)), grads)
    if embedding is None:
        size, width = head.shape
        grads = head.grads.new_zeros(*head.grads.shape[:2], 0, width)
        tokens = torch.zeros(head.num_samples, 0, dtype=torch.long, device=grads.device)
        embedding = Samples(OneHot(tokens, size, grads.dtype), grads)
    return Tied(head, embedding)
