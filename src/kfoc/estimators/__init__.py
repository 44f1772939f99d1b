"""Estimators: frozen configuration, and pure functions `init`, `update`, `finish` on a state."""

from kfoc.estimators.base import Estimator
from kfoc.estimators.block_diagonal import BlockDiagonal
from kfoc.estimators.diagonal import Diagonal
from kfoc.estimators.eigen_corrected import EigenCorrected
from kfoc.estimators.kfac import KFAC
from kfoc.estimators.kfoc import KFOC, nearest_kronecker_of_samples

__all__ = [
    "KFAC",
    "KFOC",
    "BlockDiagonal",
    "Diagonal",
    "EigenCorrected",
    "Estimator",
    "nearest_kronecker_of_samples",
]
