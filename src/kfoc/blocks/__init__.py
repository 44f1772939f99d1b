"""The kinds of curvature block, one class each: what a block is, not how it was estimated.

A block approximates the mean Fisher F of one layer's extended weight `[W | b]` of shape (o, i),
with `vec` row-major, so that `F ~ torch.kron(left, right)`.

A new kind is a frozen dataclass of tensors, numbers and blocks that provides the abstract methods
of `Block`, and an entry in `KINDS`. Everything else (solves, samples, norms, comparison, saving,
moving between devices) follows from those; `tests/blocks/test_blocks.py` runs over `KINDS`.
"""

from kfoc.blocks.base import Block, Report, placed
from kfoc.blocks.damped import METHODS, DampedBlock, Damping
from kfoc.blocks.dense import DenseBlock
from kfoc.blocks.diagonal import DiagonalBlock
from kfoc.blocks.eigen import EigenBlock
from kfoc.blocks.grouped import GroupedBlock
from kfoc.blocks.kronecker import KroneckerBlock, KroneckerDiagonalBlock
from kfoc.blocks.low_rank import LowRankBlock

KINDS: dict[str, type[Block]] = {
    kind.__name__: kind
    for kind in (
        KroneckerBlock,
        KroneckerDiagonalBlock,
        GroupedBlock,
        DiagonalBlock,
        DenseBlock,
        EigenBlock,
        LowRankBlock,
    )
}

__all__ = [
    "KINDS",
    "METHODS",
    "Block",
    "DampedBlock",
    "Damping",
    "DenseBlock",
    "DiagonalBlock",
    "EigenBlock",
    "GroupedBlock",
    "KroneckerBlock",
    "KroneckerDiagonalBlock",
    "LowRankBlock",
    "Report",
    "placed",
]
