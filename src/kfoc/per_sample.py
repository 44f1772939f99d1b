"""Per-sample gradients of any parameter, from the graph alone, where no layer rule gives them.

A parameter takes part in the outputs through a few operations on tensors that do not run over the
samples (an expansion, a transposition, a weight's normalisation), until it meets the data. The
first tensors behind it that do run over the samples are its *cuts*: the derivatives by them come
out of the same backward pass as those of all layers, a row per sample, and each row alone, taken
from the cuts down to the parameter, gives one sample's gradient. That is one short backward pass a
sample and direction, from the cuts and not from the outputs; an expansion, a sum and a product
take none, but one sum each.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from kfoc.graph import Graph, Node
from kfoc.layers import Unsupported
from kfoc.samples import Direct

# A block's per-sample gradients of one batch hold at most so many numbers (1 GiB in float32).
NUMBERS_LIMIT = 2**28

Parameters = Mapping[str, Tensor]
# What a cut is recognised by from batch to batch: the way up to it from a parameter (which of the
# users of each operation), its name, and its results' shapes.
Signature = tuple[tuple[int, ...], str, tuple[tuple[int, ...], ...]]


@dataclass(frozen=True)
class Cut:
    """The results of one operation, all of which run over the samples, samples first."""

    node: Node
    results: tuple[int, ...]
    signature: Signature

    @property
    def edges(self) -> list[GradientEdge]:
        return [GradientEdge(self.node, result) for result in self.results]


@dataclass(frozen=True)
class Region:
    """What lies between parameters and their cuts, in one batch's graph.

    Attributes:
        parameters: by name, those of one block.
        cuts: through which the parameters reach the outputs, each path through one as its first.
        order: the region's operations, cuts included, users before what they use.
        inner: those that are no cuts.
        leaves: where the gradient of each parameter ends; None where it takes no part.
    """

    parameters: Parameters
    cuts: tuple[Cut, ...]
    order: tuple[Node, ...]
    inner: frozenset[Node]
    leaves: tuple[Node | None, ...]

    @property
    def edges(self) -> list[GradientEdge]:
        """Where derivatives are needed: at the cuts, and at the parameters for a check."""
        ends = [GradientEdge(leaf, 0) for leaf in self.leaves if leaf is not None]
        return [edge for cut in self.cuts for edge in cut.edges] + ends

    def samples(self, grads: list[list[Tensor | None]], num_samples: int) -> Direct:
        """Per-sample gradients of all parameters, one flattened after the other: (S, N, n, 1).

        Args:
            grads: derivatives at `edges`: per edge, per direction; consumed.

        Raises:
            Unsupported: they are too many, or do not add up to the gradient of the batch.
        """
        size = sum(parameter.numel() for parameter in self.parameters.values())
        if len(grads[0]) * num_samples * size > NUMBERS_LIMIT:
            raise Unsupported(
                f"its {size} parameters have {len(grads[0])} per-sample gradients for each of "
                f"{num_samples} samples, of {NUMBERS_LIMIT} numbers at most: use smaller batches, "
                'or fisher="mc"'
            )
        rows = []
        for direction in range(len(grads[0])):
            each = [per_edge[direction] for per_edge in grads]
            rows.append(self._direction(each, num_samples))
            for per_edge in grads:
                per_edge[direction] = None
        return Direct(torch.stack(rows)[..., None])

    @torch.no_grad()
    def _direction(self, grads: list[Tensor | None], num_samples: int) -> Tensor:
        at_cuts = {}
        remaining = iter(grads)
        for cut in self.cuts:
            present = [(result, next(remaining)) for result in cut.results]
            at_cuts[cut.node] = [(result, g) for result, g in present if g is not None]
        totals = [None if leaf is None else next(remaining) for leaf in self.leaves]
        sizes = [(num_samples, parameter.numel()) for parameter in self.parameters.values()]
        zeros = [
            parameter.new_zeros(size, dtype=_dtype(parameter.dtype))
            for size, parameter in zip(sizes, self.parameters.values(), strict=True)
        ]
        found = {
            leaf: zero for leaf, zero in zip(self.leaves, zeros, strict=True) if leaf is not None
        }
        rest = {
            node: present
            for node, present in at_cuts.items()
            if present and not self._summed(node, present[0][1], found)
        }
        if rest:
            for n in range(num_samples):
                self._add_sample(n, rest, found)
        for name, zero, leaf, total in zip(
            self.parameters, zeros, self.leaves, totals, strict=True
        ):
            if leaf is not None:
                _check_sum(name, zero, total)
        return torch.cat(zeros, 1)

    def _summed(self, node: Node, grad: Tensor, found: dict[Node, Tensor]) -> bool:
        """Take in all samples at once at a cut that is no more than a sum, product or expansion.

        Returns:
            False where the cut is anything else, and nothing was added.
        """
        below = [(k, leaf) for k, (leaf, _) in enumerate(node.next_functions) if leaf in found]
        factors = [f for f in (_factor(node, k) for k, _ in below) if f is not None]
        shapes = [(1,) * (grad.ndim - len(s)) + s for s in (_shape(leaf, 0) for _, leaf in below)]
        if (
            not below
            or len(factors) < len(below)
            or any(shape[0] != 1 for shape in shapes)  # it has an entry per sample
            or any(leaf in self.inner for leaf, _ in node.next_functions)
        ):
            return False
        for (_, leaf), factor, shape in zip(below, factors, shapes, strict=True):
            terms = (grad * factor).sum_to_size(len(grad), *shape[1:])
            found[leaf] += terms.reshape(len(grad), -1)
        return True

    def _add_sample(
        self, n: int, at_cuts: dict[Node, list[tuple[int, Tensor]]], found: dict[Node, Tensor]
    ) -> None:
        """A backward pass of sample `n` alone from the cuts, that does not leave the region.

        What a cut got from other cuts is in the derivative by it already.
        """
        pending: dict[Node, dict[int, Tensor]] = {}
        for node, present in at_cuts.items():
            for result, grad in present:
                alone = torch.zeros_like(grad)
                alone[n] = grad[n]
                pending.setdefault(node, {})[result] = alone
        for node in self.order:
            arrived = pending.pop(node, None)
            if arrived is None:
                continue
            derivatives = _applied(node, arrived)
            for (below, result), derivative in zip(node.next_functions, derivatives, strict=True):
                if derivative is None or (below not in found and below not in self.inner):
                    continue
                # Broadcasting is undone by the engine, not by the operations themselves.
                summed = derivative.sum_to_size(_shape(below, result))
                if below in found:
                    found[below][n] += summed.flatten()
                else:
                    slots = pending.setdefault(below, {})
                    slots[result] = slots[result] + summed if result in slots else summed


def _applied(node: Node, grads: dict[int, Tensor]) -> tuple[Tensor | None, ...]:
    """The derivatives by what an operation took, from those by its results."""
    metadata = node._input_metadata
    if callable(node):
        found = node(*(grads.get(result) for result in range(len(metadata))))
    else:  # of a custom autograd.Function, which gets zeros for what is missing
        zeros = (torch.zeros(m.shape, dtype=m.dtype, device=m.device) for m in metadata)
        found = node.apply(*(grads.get(result, zero) for result, zero in enumerate(zeros)))
    return found if isinstance(found, tuple) else (found,)


def _shape(node: Node, result: int) -> tuple[int, ...]:
    return tuple(node._input_metadata[result].shape)


def _dtype(dtype: torch.dtype) -> torch.dtype:
    """Half precision squares to nothing: factors are accumulated in float32 at least."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def _factor(node: Node, argument: int) -> Tensor | float | None:
    """What the derivative by one argument of an operation is the product of; None: not known."""
    name = node.name()
    if name == "ExpandBackward0" or (name == "AddBackward0" and argument == 0):
        return 1.0
    if name == "AddBackward0":
        return float(node._saved_alpha)
    if name == "MulBackward0":
        return node._saved_other if argument == 0 else node._saved_self
    return None


def _check_sum(name: str, each: Tensor, total: Tensor | None) -> None:
    """The samples' gradients add up to the batch's, which autograd gave by itself."""
    scale = each.abs().sum(0).max()
    off = each.sum(0) if total is None else each.sum(0) - total.to(each.dtype).flatten()
    precision = torch.finfo(each.dtype if total is None else total.dtype).eps
    if off.abs().max() > 10 * math.sqrt(precision) * scale:
        raise Unsupported(
            f"the per-sample gradients of {name} do not add up to its gradient (does a tensor "
            "hook or a custom function change it?)"
        )


@dataclass
class Regions:
    """Finds the region of every block of parameters, batch after batch."""

    verified: set[tuple[str, Signature]] = field(default_factory=set)

    def find(
        self, outputs: Tensor, graph: Graph, loose: Mapping[str, Parameters]
    ) -> dict[str, Region]:
        """Block name -> its region; none for parameters that take no part in the outputs.

        Args:
            outputs: (N, ...), samples first.
            loose: block name -> parameters by name.
        """
        leaves = {
            name: tuple(graph.leaf(parameter) for parameter in parameters.values())
            for name, parameters in loose.items()
        }
        rejected: set[Node] = set()
        while True:
            walks = {
                name: _walked(graph, present, len(outputs), rejected)
                for name, each in leaves.items()
                if (present := [leaf for leaf in each if leaf is not None])
            }
            wrong = self._wrong(outputs, graph, {name: cuts for name, (cuts, _) in walks.items()})
            if not wrong:
                break
            rejected |= wrong
        return {
            name: Region(
                loose[name],
                tuple(cuts),
                _ordered([cut.node for cut in cuts], inner),
                frozenset(inner),
                leaves[name],
            )
            for name, (cuts, inner) in walks.items()
        }

    def _wrong(self, outputs: Tensor, graph: Graph, cuts: dict[str, list[Cut]]) -> set[Node]:
        """Which of the cuts not seen before have the size of the batch in front, but no samples.

        Half of the samples' outputs must leave the other half's rows without any derivative.
        """
        new = {
            (name, cut.signature): cut
            for name, each in cuts.items()
            for cut in each
            if (name, cut.signature) not in self.verified and cut.node is not graph.root[0]
        }
        count = len(outputs)
        if count < 2 or not new:
            return set()
        wrong = set()
        first, second = slice(0, count // 2), slice(count // 2, count)
        edges = [(cut.node, edge) for cut in new.values() for edge in cut.edges]
        for half, other in ((first, second), (second, first)):
            cotangent = torch.zeros_like(outputs)
            # Different weights for different outputs: equal ones cancel in a softmax.
            weights = torch.linspace(0.5, 1.5, outputs[half].numel())
            cotangent[half] = weights.to(outputs).view(outputs[half].shape)
            grads = torch.autograd.grad(
                outputs, [e for _, e in edges], cotangent, retain_graph=True, allow_unused=True
            )
            for (node, _), grad in zip(edges, grads, strict=True):
                if grad is not None and grad[other].any():
                    wrong.add(node)
        self.verified |= {key for key, cut in new.items() if cut.node not in wrong}
        return wrong


def _walked(
    graph: Graph, leaves: list[Node], count: int, rejected: set[Node]
) -> tuple[list[Cut], set[Node]]:
    """Up from the leaves to the first results that have `count` rows: cuts, and what is below."""
    cuts, inner = [], set()
    seen = set(leaves)
    waiting: deque[tuple[Node, tuple[int, ...]]] = deque(
        (leaf, (number,)) for number, leaf in enumerate(leaves)
    )
    while waiting:
        node, way = waiting.popleft()
        for number, (user, _, _) in enumerate(graph.users[node]):
            if user in seen:
                continue
            seen.add(user)
            results = {result for _, _, result in graph.users[user]}
            if user is graph.root[0]:
                results.add(graph.root[1])
            shapes = tuple(_shape(user, result) for result in sorted(results))
            by_sample = user not in rejected and all(s[:1] == (count,) for s in shapes)
            if by_sample or user is graph.root[0]:
                signature = (*way, number), user.name(), shapes
                cuts.append(Cut(user, tuple(sorted(results)), signature))
            else:
                inner.add(user)
                waiting.append((user, (*way, number)))
    return cuts, inner


def _ordered(cuts: list[Node], inner: set[Node]) -> tuple[Node, ...]:
    """Cuts and what lies below them, users before what they use."""
    uses = Counter(
        below for node in (*cuts, *inner) for below, _ in node.next_functions if below in inner
    )
    order = list(cuts)
    for node in order:  # which grows
        for below, _ in node.next_functions:
            if below in inner:
                uses[below] -= 1
                if not uses[below]:
                    order.append(below)
    return tuple(order)
