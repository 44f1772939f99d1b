"""Sums of few Kronecker products, in closed form: Algorithm 1 by inner products of the factors."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kfoc.linalg.scaling import balanced, beyond, norm_of

# Numbers of each term that are gone through at once: few enough for all to stay in the cache.
COLUMNS = 2**17

# Of inner products in float64.
PRECISION = 64 * torch.finfo(torch.float64).eps


@dataclass(frozen=True)
class Pieces:
    """`sum_j sigmas[j] vec(lefts[j]) vec(rights[j])^T`, of factors of about unit norm.

    Attributes:
        lefts: (m, o, o).
        rights: (m, i, i), or (m, i) where right factors are diagonal.
        sigmas: (m,), float64, on the CPU.
        signs: of each term 1 where its factors are symmetric, -1 where antisymmetric.
        rest: about the largest singular value of what the sum that they are of has besides.
    """

    lefts: Tensor
    rights: Tensor
    sigmas: Tensor
    signs: list[int]
    rest: float = 0.0

    @staticmethod
    def of(lefts: Tensor, rights: Tensor, sigmas: Sequence[float], rest: float = 0.0) -> Pieces:
        """With symmetric factors."""
        numbers = torch.tensor(list(sigmas), dtype=torch.float64, device="cpu")
        return Pieces(lefts, rights, numbers, [1] * len(numbers), rest)

    def __len__(self) -> int:
        return len(self.signs)

    def scaled(self, factor: float) -> Pieces:
        return replace(self, sigmas=self.sigmas * factor, rest=self.rest * factor)

    @property
    def sides(self) -> tuple[Tensor, Tensor]:
        return self.lefts, self.rights


@dataclass(frozen=True)
class Triples:
    """Singular triples as combinations of m terms, by falling sigma.

    Attributes:
        shares: of the terms in the left and in the right factors, (k, m) each.
        sigmas: (k,).
        signs: see `Pieces`.
    """

    shares: tuple[Tensor, Tensor]
    sigmas: Tensor
    signs: list[int]

    def symmetric(self) -> tuple[Tensor, Tensor] | None:
        """Shares of the leading triple with symmetric factors."""
        first = next((j for j, sign in enumerate(self.signs) if sign > 0), None)
        return None if first is None else (self.shares[0][first], self.shares[1][first])

    def leading(self, count: int) -> Triples:
        left, right = self.shares
        return Triples((left[:count], right[:count]), self.sigmas[:count], self.signs[:count])


def singular(
    grams: Sequence[Tensor], sigmas: Tensor, signs: Sequence[int], precision: float
) -> Triples:
    """The singular triples of `sum_j sigmas[j] vec(L_j) vec(R_j)^T`: Algorithm 1 in closed form.

    Args:
        grams: inner products of all L, and of all R, (m, m) in float64.
        sigmas: (m,).
        signs: see `Pieces`. Factors of different ones are orthogonal, and never mixed.
        precision: of the inner products, relatively.
    """
    norms = [gram.diagonal().clamp_min(0).sqrt() for gram in grams]
    inverse = [torch.where(norm > 0, 1 / norm, 0.0) for norm in norms]
    grams = [gram * each * each[:, None] for gram, each in zip(grams, inverse, strict=True)]
    sigmas = sigmas * norms[0] * norms[1]
    found: list[tuple[float, int, Tensor, Tensor]] = []
    for sign in (1, -1):
        of = torch.tensor([j for j, each in enumerate(signs) if each == sign], dtype=torch.long)
        if not len(of):
            continue
        parts = [_orthonormal(gram[of][:, of], precision) for gram in grams]
        (left, root_left), (right, root_right) = parts
        u, values, v = torch.linalg.svd((root_left * sigmas[of]) @ root_right.mT)
        values, shares = values.tolist(), [u.mT @ left, v @ right]
        if values and values[0] > 0:
            # The leading one by a half step more, from inner products of its factors: where all
            # terms are PSD these are not negative, and rounding cannot take it off the cone.
            along = [gram[of][:, of] @ each[0] for gram, each in zip(grams, shares, strict=True)]
            shares[0][0] = sigmas[of] * along[1] / values[0]
            shares[1][0] = sigmas[of] * along[0] / values[0]
            if shares[0][0].sum() < 0:
                shares = [torch.cat([-each[:1], each[1:]]) for each in shares]
        for value, one, other in zip(values, *shares, strict=False):
            both = sigmas.new_zeros(2, len(signs))
            both[0, of], both[1, of] = one, other
            found.append((value, sign, both[0], both[1]))
    found.sort(key=lambda each: -each[0])
    empty = [sigmas.new_zeros(0, len(signs))]
    left = torch.cat([*empty, *(each[2][None] for each in found)]) * inverse[0]
    right = torch.cat([*empty, *(each[3][None] for each in found)]) * inverse[1]
    values = sigmas.new_tensor([each[0] for each in found])
    return Triples((left, right), values, [each[1] for each in found])


def _orthonormal(gram: Tensor, precision: float) -> tuple[Tensor, Tensor]:
    """Orthonormal combinations of terms, (p, m), and the terms in those as a basis, (p, m).

    Directions that the inner products know from rounding alone are left out.
    """
    values, vectors = torch.linalg.eigh(gram)
    kept = values > precision
    roots, basis = values[kept].sqrt()[:, None], vectors[:, kept].mT
    return basis / roots, basis * roots


def _parts(stacks: Sequence[Tensor]) -> Iterator[tuple[slice, list[Tensor]]]:
    """All terms, flattened, by ranges of their numbers."""
    flat = [stack.flatten(1) for stack in stacks if len(stack)]
    for start in range(0, flat[0].shape[1] if flat else 0, COLUMNS):
        of = slice(start, start + COLUMNS)
        yield of, [stack[:, of] for stack in flat]


def products(stacks: Sequence[Tensor], wide: bool = True) -> Tensor:
    """Inner products of all terms, (m, m), in float64 on the CPU; of numbers as they are or so."""
    sizes = [len(stack) for stack in stacks if len(stack)]
    total = torch.zeros(sum(sizes), sum(sizes), dtype=torch.float64, device=stacks[0].device)
    blocks = [row.split(sizes, 1) for row in total.split(sizes, 0)]
    for _, parts in _parts(stacks):
        parts = [part.double() for part in parts] if wide else parts
        for k, part in enumerate(parts):
            for j in range(k + 1):
                blocks[j][k].add_(parts[j] @ part.mT)
    total = total.triu()
    return (total + total.triu(1).mT).cpu()


def combined(stacks: Sequence[Tensor], shares: Tensor) -> Tensor:
    """Combinations of all terms, (k, *shape), by shares (k, m)."""
    first = stacks[0]
    found = first.new_zeros(len(shares), *first.shape[1:])
    if not found.numel():
        return found
    flat = found.view(len(shares), -1)
    split = shares.to(found).split([len(stack) for stack in stacks if len(stack)], 1)
    for of, parts in _parts(stacks):
        for part, share in zip(parts, split, strict=True):
            flat[:, of].addmm_(share, part)
    return found


def symmetries(stack: Tensor) -> list[int]:
    """`signs` of matrices (k, n, n), each symmetric or antisymmetric to rounding.

    By which of transpose and minus transpose is nearer: sums may round differently above the
    diagonal and below, as the processor has it, and then a matrix is equal to neither.
    """
    apart = ((stack - sign * stack.mT).abs().amax((1, 2)).tolist() for sign in (1, -1))
    return [1 if one <= other else -1 for one, other in zip(*apart, strict=True)]


def nearest_to_pair(
    first: tuple[Tensor, Tensor],
    second: tuple[Tensor, Tensor],
    shares: tuple[float, float] = (1.0, 1.0),
) -> tuple[Tensor, Tensor]:
    """The Kronecker product closest to the weighted sum of two; the merge of K-FOC_running.

    Args:
        first, second: (left, right) of shapes (o, o) and (i, i), each factor PSD, or right factors
            (i,) that are diagonals.
        shares: positive weights of the two products in the sum.

    Returns:
        The balanced (left, right).

    Raises:
        ValueError: factors that are not finite.
    """
    pairs = first, second
    norms = [[norm_of(factor) for factor in pair] for pair in pairs]
    sigmas = [share * a * b for share, (a, b) in zip(shares, norms, strict=True)]
    if not all(math.isfinite(norm) for pair in norms for norm in pair):
        raise ValueError(beyond("a factor", first[0].dtype, ""))
    if not all(sigmas):
        which = int(not sigmas[0])
        return balanced(*pairs[which], sigmas[which])
    sides = [
        [torch.stack([pair[k] / norm[k] for pair, norm in zip(pairs, norms, strict=True)])]
        for k in range(2)
    ]
    grams = [products(side) for side in sides]
    numbers = torch.tensor(sigmas, dtype=torch.float64, device="cpu")
    found = singular(grams, numbers / numbers.max(), [1, 1], PRECISION).leading(1)
    left, right = (combined(s, shares)[0] for s, shares in zip(sides, found.shares, strict=True))
    return balanced(left, right, found.sigmas[0].item() * max(sigmas))


def recompressed(lefts: Tensor, rights: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The closest sum of `rank` Kronecker products to `sum_k kron(lefts[k], rights[k])`.

    Args:
        lefts, rights: (k, o, o) and (k, i, i), of each term both symmetric or antisymmetric.

    Returns:
        (rank, o, o) and (rank, i, i), balanced.
    """
    signs = symmetries(lefts)
    ones = torch.ones(len(lefts), dtype=torch.float64, device="cpu")
    found = singular([products([lefts]), products([rights])], ones, signs, PRECISION).leading(rank)
    roots = found.sigmas.sqrt()[:, None]
    return combined([lefts], found.shares[0] * roots), combined([rights], found.shares[1] * roots)
