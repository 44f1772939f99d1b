"""Estimators: frozen configuration, which begins the state of every layer."""

from kfoc.estimators.base import Estimator, State
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
    "State",
    "nearest_kronecker_of_samples",
]
