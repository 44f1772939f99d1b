"""Kronecker-factored optimal curvature of PyTorch models."""

from kfoc.blocks import Block, DenseBlock, DiagonalBlock, GroupedBlock, KroneckerBlock, Report
from kfoc.coverage import Coverage, LayerCoverage, ParameterCount
from kfoc.curvature import Curvature
from kfoc.estimators import (
    KFAC,
    KFOC,
    BlockDiagonal,
    Diagonal,
    Estimator,
    nearest_kronecker_of_samples,
)
from kfoc.fit import fit
from kfoc.kronecker import KroneckerFit, nearest_kronecker
from kfoc.layers import Treatment, Unsupported, register
from kfoc.likelihoods import Bernoulli, Categorical, Gaussian, Likelihood
from kfoc.samples import Rows

__all__ = [
    "KFAC",
    "KFOC",
    "Bernoulli",
    "Block",
    "BlockDiagonal",
    "Categorical",
    "Coverage",
    "Curvature",
    "DenseBlock",
    "Diagonal",
    "DiagonalBlock",
    "Estimator",
    "Gaussian",
    "GroupedBlock",
    "KroneckerBlock",
    "KroneckerFit",
    "LayerCoverage",
    "Likelihood",
    "ParameterCount",
    "Report",
    "Rows",
    "Treatment",
    "Unsupported",
    "fit",
    "nearest_kronecker",
    "nearest_kronecker_of_samples",
    "register",
]

__version__ = "0.1.0"
