"""A fit whose data lies with several ranks."""

from kfoc.distributed.ranks import Ranks, RanksError

__all__ = ["Ranks", "RanksError"]
