"""The graph that autograd recorded, read upwards: from parameters to what was made of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor

Node = Any  # torch.autograd.graph.Node; those of custom functions do not derive from it


class Graph:
    """The backward graph of `outputs`, with edges in the direction of the forward pass.

    Attributes:
        root: the node that the outputs came from, and which of its results they are.
        users: node -> the nodes that used its results: (user, which argument of the user, which
            of the node's results).
    """

    def __init__(self, outputs: Tensor) -> None:
        self.root = outputs.grad_fn, outputs.output_nr
        self.users: dict[Node, list[tuple[Node, int, int]]] = {outputs.grad_fn: []}
        self._leaves: dict[int, Node] = {}  # parameter -> where its gradient ends
        users = self.users
        waiting: list[Node] = [outputs.grad_fn]
        while waiting:
            user = waiting.pop()
            for argument, (node, result) in enumerate(user.next_functions):
                if node is None:
                    continue
                known = users.get(node)
                if known is None:
                    known = users[node] = []
                    variable = getattr(node, "variable", None)
                    if variable is None:
                        waiting.append(node)
                    else:
                        self._leaves[id(variable)] = node
                known.append((user, argument, result))

    def uses(self, parameter: Tensor) -> int:
        """How many operations took the parameter as an argument.

        Under autocast it is cast once for all of them: uses of the cast are uses of it.
        """
        leaf, count = self._leaves.get(id(parameter)), 0
        for user, _, _ in () if leaf is None else self.users[leaf]:
            count += len(self.users[user]) if user.name() == "ToCopyBackward0" else 1
        return count

    def after(self, nodes: Iterable[Node]) -> set[Node]:
        """All nodes that what these nodes made went into: a backward pass to these comes by."""
        found: set[Node] = set()
        waiting = list(nodes)
        while waiting:
            for user, _, _ in self.users.get(waiting.pop(), ()):
                if user not in found:
                    found.add(user)
                    waiting.append(user)
        return found

    def names(self) -> Iterator[str]:
        """The names of all operations."""
        return (node.name() for node in self.users)
