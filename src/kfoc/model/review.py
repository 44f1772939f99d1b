"""What a forward pass shows of layers that have no treatment after all."""

from __future__ import annotations

from collections.abc import Container

from kfoc.model.graph import Graph
from kfoc.model.trace import Record


def untreatable(graph: Graph, record: Record, known: Container[str]) -> dict[str, str]:
    """Layers that this forward pass shows to have no treatment.

    Args:
        known: layers that earlier batches gave a state.

    Returns:
        layer name -> the reason not to treat it.

    Raises:
        ValueError: a graph of which no layer's derivatives can be had.
    """
    for name in graph.names():
        if name in NO_DERIVATIVES:
            raise ValueError(NO_DERIVATIVES[name])
    # A layer all of whose gradients are zero has no block, unless earlier batches gave it one.
    silent = record.mute - record.calls.keys()
    reasons = {
        name: "its output carries no gradient (torch.no_grad()?)"
        for name in silent
        if name not in known
    }
    return reasons | record.problems


UNCALLED = "its parameters are used outside of its forward, which was not called"

# Operations in the graph that torch.autograd.grad does not get past.
NO_DERIVATIVES = {
    "CheckpointFunctionBackward": (
        "the model uses torch.utils.checkpoint with use_reentrant=True, which gives no derivatives "
        "by layers: pass use_reentrant=False"
    ),
    "CompiledFunctionBackward": (
        "the model runs compiled, and its layers cannot be seen: pass the module that "
        "torch.compile was given"
    ),
}
