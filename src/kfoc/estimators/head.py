"""A sum of Kronecker products that comes in piece by piece, as head and tail.

**Head**: the leading singular triples of everything so far. What comes in (a buffer's own leading
triples, another rank's head) is merged with them in closed form, from inner products alone.

**Tail**: what merging and truncating leave out, `D = head + A - new head`, is not dropped. At the
present best pair (l, r) its two half steps `D r` and `D^T l` are added up, with the core
`<D, l r^T>`. Such sums determine a rank-one approximation, `(sum D r) (sum D^T l)^T / core`, a
generalised Nystrom approximation, whose pair takes part in what is best.

The head alone is what heavy-tailed gradients need, and the tail what flat spectra need: there,
what is left out of each buffer is large, and much the same in all of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kfoc.estimators.pooling import Gather, Pooling, Sum, largest, summed
from kfoc.nearest.pair import Pieces, Triples, combined, products, singular

# The core is taken for this share of the tail's larger sum at least. Where it is small, as when
# the best pair has turned since, the quotient would be anything; the sums bound it.
TAMED = 0.3

# Where the tail moves the best pair so little that sigma changes by less than this share, half
# steps are taken of a sample of what is quiet: at most of every so many, which then count for the
# others.
NEGLIGIBLE = 1e-3
SPARSEST = 4

# Loud is what adds to the half steps more than so many times the mean.
LOUD = 2.0

# Adds `A r` to its third argument and `A^T l` to its fourth, for a pair (l, r), the first two, and
# times the fifth; returns `<A, l r^T>`.
HalfSteps = Callable[[Tensor, Tensor, Tensor, Tensor, float], float]


@dataclass(frozen=True)
class _LeftOut:
    """The half steps of head + new - new head at a pair (l, r).

    Attributes:
        products: of l and of r with all terms' factors.
        shares: of the terms in the half step from r and in that from l.
    """

    products: tuple[Tensor, Tensor]
    shares: tuple[Tensor, Tensor]

    @staticmethod
    def of(
        pair: Sequence[Tensor], sigmas: Tensor, grams: Sequence[Tensor], merged: Triples
    ) -> _LeftOut:
        count = len(sigmas)
        left, right = ((g @ shares)[:count] for g, shares in zip(grams, pair, strict=True))
        here, there = merged.shares
        from_right = sigmas * right - here.mT @ (merged.sigmas * (there @ right))
        from_left = sigmas * left - there.mT @ (merged.sigmas * (here @ left))
        return _LeftOut((left, right), (from_right, from_left))

    def bound(self, grams: Sequence[Tensor], rest: float, first: int) -> float:
        """Of their norms, with those of what the terms from `first` on lack of their sum.

        That is orthogonal to their factors, and sees of the pair what they do not.
        """
        both = zip(self.shares, grams, strict=True)
        squares = [(lack @ gram[: len(lack), : len(lack)] @ lack).item() for lack, gram in both]
        within = min(side[first:].square().sum().item() for side in self.products)
        return math.sqrt(max(0.0, *squares)) + rest * math.sqrt(max(1.0 - within, 0.0))


class Head:
    """The head and the tail of a sum.

    Attributes:
        size: how many triples are kept, at most.
        tailed: whether there is a tail.
        nothing: no terms, of the right shapes.
        terms: the head.
        tail: (sum of D r, sum of D^T l); None as long as nothing was left out.
        core: sum of `<D, l r^T>`.
        met: how many pieces came with half steps, and `bounds` the sum of what they add to them.
        every, waiting: of the quiet ones they are taken of one in so many, which counts as often,
            and how many went without since.
    """

    size: int
    tailed: bool
    nothing: Pieces
    terms: Pieces
    tail: tuple[Tensor, Tensor] | None
    core: float
    met: int
    bounds: float
    every: int
    waiting: int

    def __init__(
        self, size: int, tailed: bool, shapes: Sequence[Sequence[int]], like: Tensor
    ) -> None:
        self.size, self.tailed = size, tailed
        left, right = (like.new_zeros(0, *shape) for shape in shapes)
        self.terms = self.nothing = Pieces.of(left, right, [])
        self.tail = None
        self.core = 0.0
        self.met, self.bounds = 0, 0.0
        self.every, self.waiting = 1, 0

    def scale(self, factor: float) -> None:
        """Let all that was added so far count `factor` times."""
        self.terms = self.terms.scaled(factor)
        for total in self.tail or ():
            total.mul_(factor)
        self.core *= factor
        self.bounds *= factor

    @property
    def quiet(self) -> bool:
        """Whether what is left out hardly moved the best pair, when that was last looked at."""
        return self.every > 1

    def add(self, new: Pieces, half_steps: HalfSteps | None = None) -> None:
        """Add A, of which `new` are about the leading triples.

        Args:
            half_steps: of A; None where A is the sum of `new`.
        """
        sides = [list(pair) for pair in zip(self.terms.sides, new.sides, strict=True)]
        sigmas = torch.cat([self.terms.sigmas, new.sigmas])
        signs = [*self.terms.signs, *new.signs]
        grams = self._grams(sides)
        count = len(signs)
        own = [gram[:count, :count] for gram in grams]
        merged = singular(own, sigmas, signs, self._precision).leading(self.size)
        # Of the first to come, `new` has the best pair's half steps.
        if self.tailed and (len(self.terms) or not self.size or half_steps is None):
            best = self._with_tail(grams, sigmas, signs)
            # The best pair of all there is, before anything is left out. A symmetric one: others
            # would not add up with those of other batches.
            pair = best.symmetric()
            if pair is not None:
                # Of all batches and ranks the same sign, as half steps add up: l of positive trace.
                if pair[0] @ _traces(self._behind(sides)[0]) < 0:
                    pair = -pair[0], -pair[1]
                left_out = _LeftOut.of(pair, sigmas, grams, merged)
                share = 1
                if half_steps:
                    bound = left_out.bound(grams, new.rest, len(self.terms))
                    self.met, self.bounds = self.met + 1, self.bounds + bound
                    loud = bound * self.met > LOUD * self.bounds
                    share = 1 if loud else self._due(best, merged, grams)
                if share:
                    self._lengthen(sides, left_out, sigmas, pair, half_steps, share)
        lefts, rights = (combined(s, c) for s, c in zip(sides, merged.shares, strict=True))
        self.terms = Pieces(lefts, rights, merged.sigmas, merged.signs)

    def _due(self, best: Triples, merged: Triples, grams: Sequence[Tensor]) -> int:
        """How often the half steps at this place count; 0: they are not taken."""
        self.waiting += 1
        alone = merged.symmetric()
        moves = True
        if self.tail is not None and alone is not None:
            # What the whole sum has along the best pair of the head alone:
            # sum_j s_j <l_j, l> <r_j, r> over the triples of the whole.
            without = [gram[:, : len(each)] @ each for gram, each in zip(grams, alone, strict=True)]
            along = [each @ side for each, side in zip(best.shares, without, strict=True)]
            reached = (best.sigmas * along[0] * along[1]).sum().item()
            moves = reached < (1 - NEGLIGIBLE) * best.sigmas[0].item()
        if moves:
            self.every = 1
        if self.waiting < self.every:
            return 0
        share, self.waiting = self.waiting, 0
        self.every = 1 if moves else min(2 * self.every, SPARSEST)
        return share

    def _lengthen(
        self,
        sides: list[list[Tensor]],
        left_out: _LeftOut,
        sigmas: Tensor,
        pair: Sequence[Tensor],
        half_steps: HalfSteps | None,
        share: float,
    ) -> None:
        """Add to the tail `share` times what the new head leaves out, at the best pair."""
        left, right = left_out.products
        lacks, first = left_out.shares, len(self.terms)
        factors: list[Tensor] = []
        if half_steps:
            lacks[0][first:] -= sigmas[first:] * right[first:]  # they have all that A has of it
            lacks[1][first:] -= sigmas[first:] * left[first:]
            with_tail = zip(self._behind(sides), pair, strict=True)
            factors = [combined(stacks, shares[None])[0] for stacks, shares in with_tail]
        if self.tail is None:
            self.tail = self._zeros()
        for total, stacks, lack in zip(self.tail, sides, lacks, strict=True):
            total += combined(stacks, share * lack[None])[0]
        self.core += share * (left @ lacks[0]).item()
        if half_steps:
            self.core += share * half_steps(factors[0], factors[1], *self.tail, share)

    def _zeros(self) -> tuple[Tensor, Tensor]:
        left, right = (side.new_zeros(side.shape[1:]) for side in self.nothing.sides)
        return left, right

    def leading(self, count: int) -> Pieces:
        """At most `count` leading triples of head and tail."""
        sides = [[side] for side in self.terms.sides]
        found = self._with_tail(self._grams(sides), self.terms.sigmas, self.terms.signs)
        found = found.leading(count)
        every = zip(self._behind(sides), found.shares, strict=True)
        lefts, rights = (combined(stacks, shares) for stacks, shares in every)
        return Pieces(lefts, rights, found.sigmas, found.signs)

    def pooled(self) -> Pooling[None]:
        """Take in the other ranks' heads and tails, all in the same units.

        Tails add up. Heads go round triple by triple, which keeps one pair of every rank in memory
        and not a whole head; all ranks merge them in the same order, to the same result.
        """
        (self.core,) = yield from summed(self.core)
        (tailed,) = yield from largest(self.tail is not None)
        if tailed:
            self.tail = self.tail or self._zeros()
            yield [Sum(list(self.tail))]
        own, self.terms = self.terms, self.nothing
        (most,) = yield from largest(len(own))
        for number in range(int(most)):
            sent = [side.new_zeros(side.shape[1:]) for side in own.sides]
            sigma, sign = 0.0, 1
            if number < len(own):
                sent = [side[number].contiguous() for side in own.sides]
                sigma, sign = own.sigmas[number].item(), own.signs[number]
            about = torch.tensor([sigma, sign], dtype=torch.float64, device="cpu")
            gather = Gather([*sent, about])
            yield [gather]
            there = [each for each in gather.found if each[2][0] > 0]
            if there:
                lefts, rights, numbers = (torch.stack(each) for each in zip(*there, strict=True))
                signs = [round(sign) for sign in numbers[:, 1].tolist()]
                self.add(Pieces(lefts, rights, numbers[:, 0].contiguous(), signs))

    def _behind(self, sides: list[list[Tensor]]) -> list[list[Tensor]]:
        """The terms with the tail behind them, on both sides."""
        if self.tail is None:
            return sides
        return [[*stacks, total[None]] for stacks, total in zip(sides, self.tail, strict=True)]

    def _grams(self, sides: list[list[Tensor]]) -> list[Tensor]:
        # Without a tail nothing makes up for what rounding hides in terms that are nearly the same.
        return [products(stacks, wide=not self.tailed) for stacks in self._behind(sides)]

    @property
    def _precision(self) -> float:
        """Of inner products: where they are not wide, sums of the dtype's own."""
        return 64 * torch.finfo(self.terms.lefts.dtype if self.tailed else torch.float64).eps

    def _with_tail(self, grams: Sequence[Tensor], sigmas: Tensor, signs: list[int]) -> Triples:
        """The triples of all terms and the tail, with which the inner products end."""
        if self.tail is None:
            return singular(grams, sigmas, signs, self._precision)
        larger = math.sqrt(max(gram[-1, -1].item() for gram in grams))
        quotient = 1 / max(self.core, TAMED * larger) if larger else 0.0
        sigmas = torch.cat([sigmas, sigmas.new_tensor([quotient])])
        return singular(grams, sigmas, [*signs, 1], self._precision)


def _traces(stacks: Sequence[Tensor]) -> Tensor:
    """Of all left factors, in float64 on the CPU."""
    each = [stack.diagonal(dim1=1, dim2=2).sum(1) for stack in stacks]
    return torch.cat(each).double().cpu()
