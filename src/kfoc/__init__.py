"""Kronecker-factored optimal curvature of PyTorch models."""

from kfoc.blocks import (
    Block,
    DenseBlock,
    DiagonalBlock,
    EigenBlock,
    GroupedBlock,
    KroneckerBlock,
    KroneckerDiagonalBlock,
    LowRankBlock,
    Report,
)
from kfoc.checkpoint import Checkpoint
from kfoc.consolidation import Consolidation
from kfoc.coverage import Coverage, LayerCoverage, ParameterCount
from kfoc.curvature import Curvature
from kfoc.damped import DampedCurvature
from kfoc.estimators import (
    KFAC,
    KFOC,
    BlockDiagonal,
    Diagonal,
    EigenCorrected,
    Estimator,
    nearest_kronecker_of_samples,
)
from kfoc.fit import fit
from kfoc.influence import Influence, Ranking, influence
from kfoc.interop import transformers as _transformers  # noqa: F401  (registers its layers)
from kfoc.kronecker import KroneckerFit, nearest_kronecker
from kfoc.laplace import DataFit, Laplace, OutputGaussian
from kfoc.layers import Treatment, Unsupported, register
from kfoc.likelihoods import Bernoulli, Categorical, Gaussian, Likelihood
from kfoc.merge import Comparison
from kfoc.natural_gradient import NaturalGradient
from kfoc.progress import Progress
from kfoc.samples import Rows
from kfoc.sharding import ShardedCurvature
from kfoc.tracker import Tracker

__all__ = [
    "KFAC",
    "KFOC",
    "Bernoulli",
    "Block",
    "BlockDiagonal",
    "Categorical",
    "Checkpoint",
    "Comparison",
    "Consolidation",
    "Coverage",
    "Curvature",
    "DampedCurvature",
    "DataFit",
    "DenseBlock",
    "Diagonal",
    "DiagonalBlock",
    "EigenBlock",
    "EigenCorrected",
    "Estimator",
    "Gaussian",
    "GroupedBlock",
    "Influence",
    "KroneckerBlock",
    "KroneckerDiagonalBlock",
    "KroneckerFit",
    "Laplace",
    "LayerCoverage",
    "Likelihood",
    "LowRankBlock",
    "NaturalGradient",
    "OutputGaussian",
    "ParameterCount",
    "Progress",
    "Ranking",
    "Report",
    "Rows",
    "ShardedCurvature",
    "Tracker",
    "Treatment",
    "Unsupported",
    "fit",
    "influence",
    "nearest_kronecker",
    "nearest_kronecker_of_samples",
    "register",
]

__version__ = "0.1.0"
