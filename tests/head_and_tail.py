"""Head and tail by dense algebra: what `KFOC()` does with a stream, written out once more."""

from __future__ import annotations

import torch
from torch import Tensor


class Recursion:
    """Head and tail of one layer written out with dense matrices, of A in the rearrangement."""

    def __init__(self, o: int, i: int, size: int = 4) -> None:
        self.o, self.i, self.size = o, i, size
        self.u, self.s, self.v = torch.zeros(o * o, 0), torch.zeros(0), torch.zeros(i * i, 0)
        self.left, self.right, self.core = torch.zeros(o * o), torch.zeros(i * i), 0.0

    @property
    def head(self) -> Tensor:
        return (self.u * self.s) @ self.v.mT

    @property
    def tail(self) -> Tensor:
        larger = max(self.left.norm().item(), self.right.norm().item())
        return torch.outer(self.left, self.right) / (max(self.core, 0.3 * larger) or 1.0)

    def add(self, a: Tensor, known: bool = False, share: float = 1.0, triples: int = 2) -> None:
        """Add a batch; or, where `a` is `known`, a sum of few triples that is merged as it is.

        Args:
            share: how often what the head leaves out counts in the tail.
            triples: of the batch's own.
        """
        batch = a
        if not known:
            images = [a @ torch.eye(self.i).flatten()]
            for _ in range(2):
                images.append(unit(a @ (a.mT @ unit(images[-1]))))
            basis = torch.linalg.qr(torch.stack(images, 1))[0]
            u, s, vh = torch.linalg.svd(basis.mT @ a, full_matrices=False)
            batch = basis @ (u[:, :triples] * s[:triples]) @ vh[:triples]
        u, s, vh = torch.linalg.svd(self.head + batch + self.tail, full_matrices=False)
        left, right = u[:, 0], vh[0]
        begun, before = len(self.s) > 0, self.head
        u, s, vh = torch.linalg.svd(self.head + batch, full_matrices=False)
        self.u, self.s, self.v = u[:, : self.size], s[: self.size], vh[: self.size].mT
        if begun or known or not self.size:
            rest = before + a - self.head
            self.left += share * (rest @ right)
            self.right += share * (rest.mT @ left)
            self.core += share * (left @ rest @ right).item()

    def scale(self, factor: float) -> None:
        self.s, self.core = self.s * factor, self.core * factor
        self.left, self.right = self.left * factor, self.right * factor

    def joined(self, others: list[Recursion]) -> Recursion:
        """With those of other ranks: tails added, and heads merged triple by triple."""
        every = [self, *others]
        total = Recursion(self.o, self.i, self.size)
        total.left = torch.stack([each.left for each in every]).sum(0)
        total.right = torch.stack([each.right for each in every]).sum(0)
        total.core = sum(each.core for each in every)
        for j in range(max(len(each.s) for each in every)):
            there = [each for each in every if j < len(each.s)]
            total.add(sum(e.s[j] * torch.outer(e.u[:, j], e.v[:, j]) for e in there), known=True)
        return total

    def product(self) -> Tensor:
        u, s, vh = torch.linalg.svd(self.head + self.tail, full_matrices=False)
        sides = u[:, 0].view(self.o, self.o), vh[0].view(self.i, self.i)
        return s[0] * torch.kron(*(on_the_cone(side * side.trace().sign()) for side in sides))


def unit(vector: Tensor) -> Tensor:
    return vector / vector.norm()


def on_the_cone(matrix: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values.clamp_min(0)) @ vectors.mT
