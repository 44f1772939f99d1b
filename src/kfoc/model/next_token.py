"""Models of the next token, fed as they are trained: by batches of tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from kfoc.model.batches import called

# What CrossEntropyLoss ignores by default, and data collators put in place of padding.
IGNORED = -100


class NextToken:
    """`next_token`, as a function `(model, inputs) -> outputs`."""

    def __call__(self, model: nn.Module, inputs: Any) -> Tensor:
        outputs = called(model, inputs)
        logits = outputs if isinstance(outputs, Tensor) else getattr(outputs, "logits", None)
        tokens = _tokens(inputs)
        if not isinstance(logits, Tensor) or logits.shape[:2] != tokens.shape or logits.ndim != 3:
            found = tuple(logits.shape) if isinstance(logits, Tensor) else type(outputs).__name__
            raise ValueError(
                f"predict=kfoc.next_token needs outputs or .logits (N, T, C) for the tokens "
                f"{tuple(tokens.shape)}, found {found}: pass a predict of your own"
            )
        return logits[:, :-1]

    def targets(self, inputs: Any, targets: Any) -> Tensor:
        """The labels (N, T - 1) of those outputs."""
        tokens = _tokens(inputs)
        labels = tokens if targets is None else targets
        if not isinstance(labels, Tensor) or labels.shape != tokens.shape:
            found = tuple(labels.shape) if isinstance(labels, Tensor) else type(labels).__name__
            raise ValueError(
                f"predict=kfoc.next_token shifts the labels itself: they must be (N, T), as the "
                f"tokens are, {tuple(tokens.shape)}, found {found}"
            )
        mask = inputs.get("attention_mask") if isinstance(inputs, Mapping) else None
        if mask is not None:
            labels = labels.masked_fill(mask == 0, IGNORED)
        return labels[:, 1:]

    def __repr__(self) -> str:
        return "kfoc.next_token"


def _tokens(inputs: Any) -> Tensor:
    found = inputs.get("input_ids") if isinstance(inputs, Mapping) else inputs
    if not isinstance(found, Tensor) or found.ndim != 2 or found.is_floating_point():
        raise ValueError(
            'predict=kfoc.next_token needs "input_ids" (N, T) in the batch, or the tokens as its '
            f"inputs, found {type(found).__name__}"
        )
    return found


next_token = NextToken()
"""`predict=kfoc.next_token`: the outputs at all positions but the last are about the tokens at
all but the first, as causal language models of transformers shift them for their loss.

For batches of "input_ids" (N, T) by name, perhaps with "attention_mask" and "labels", or of the
tokens alone, and models whose outputs or `.logits` are (N, T, C). Labels that are missing are
the tokens; those of -100, and where the mask is 0, do not count.
"""
