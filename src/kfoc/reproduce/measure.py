"""How far an approximation of a curvature block is from the exact one.

All in the rearranged form A[(o, o'), (i, i')] = F[(o, i), (o', i')], in which L (x) R is the outer
product vec(L) vec(R)^T. Differences are formed and then measured: subtracting squared norms instead
would lose every digit of a small error.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class ExactBlock:
    """The exact block of one layer, and what it is compared by.

    rearranged: (o * o, i * i); norm: its Frobenius norm, which is that of F.
    """

    rearranged: Tensor
    rows: int
    columns: int
    norm: float

    @staticmethod
    def from_dense(dense: Tensor, rows: int, columns: int) -> ExactBlock:
        """dense: F (o * i, o * i) of a layer with weight [W | b] of shape (rows, columns)."""
        o, i = rows, columns
        rearranged = dense.reshape(o, i, o, i).transpose(1, 2).reshape(o * o, i * i)
        return ExactBlock(rearranged, o, i, float(torch.linalg.vector_norm(rearranged)))

    def kronecker_error(self, left: Tensor, right: Tensor) -> float:
        """||F - left (x) right|| / ||F||, with left (o, o) and right (i, i)."""
        flat = left.reshape(-1), right.reshape(-1)
        return self._relative(torch.addr(self.rearranged, *flat, alpha=-1))

    def diagonal_error(self, diagonal: Tensor) -> float:
        """||F - diag(diagonal)|| / ||F||, with diagonal (o, i)."""
        o, i = self.rows, self.columns
        difference = self.rearranged.clone()
        blocks = difference.view(o, o, i, i)
        blocks.diagonal(dim1=0, dim2=1).diagonal(dim1=0, dim2=1).sub_(diagonal.reshape(o, i))
        return self._relative(difference)

    def optimal_error(self) -> float:
        """The least error any left (x) right can have.

        What the leading singular direction of A leaves over; by the eigenvectors of the smaller
        Gram matrix, which owes nothing to the library's own power iteration.
        """
        rows, columns = self.rearranged.shape
        wide = self.rearranged if rows <= columns else self.rearranged.T
        leading = torch.linalg.eigh(wide @ wide.T).eigenvectors[:, -1]
        return self._relative(wide - torch.outer(leading, leading @ wide))

    def _relative(self, difference: Tensor) -> float:
        error = float(torch.linalg.vector_norm(difference))
        # A block of zeros (a dead layer) is met exactly by zero factors.
        return error / self.norm if self.norm > 0 else error
