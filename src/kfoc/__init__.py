"""Kronecker-factored optimal curvature of PyTorch models."""

from kfoc.applications.consolidation import Consolidation
from kfoc.applications.influence import Influence, Ranking, influence, self_influence
from kfoc.applications.laplace import DataFit, Laplace, OutputGaussian, Validation
from kfoc.applications.natural_gradient import NaturalGradient
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
from kfoc.curvature.arithmetic import Comparison
from kfoc.curvature.curvature import Curvature
from kfoc.curvature.damped import DampedCurvature
from kfoc.distributed.sharded import ShardedCurvature
from kfoc.estimators import (
    KFAC,
    KFOC,
    BlockDiagonal,
    Diagonal,
    EigenCorrected,
    Estimator,
    State,
    nearest_kronecker_of_samples,
)
from kfoc.fisher.fisher import Fisher, Solution
from kfoc.fit import fit
from kfoc.layers.rule import Treatment, Unsupported, register
from kfoc.likelihoods.base import Likelihood
from kfoc.likelihoods.bernoulli import Bernoulli
from kfoc.likelihoods.categorical import Categorical
from kfoc.likelihoods.gaussian import Gaussian
from kfoc.likelihoods.heteroscedastic import HeteroscedasticGaussian
from kfoc.likelihoods.weighted import SampleWeighted
from kfoc.model.next_token import next_token
from kfoc.nearest.power import KroneckerFit
from kfoc.nearest.terms import nearest_kronecker
from kfoc.parameters.coverage import Coverage, LayerCoverage, ParameterCount
from kfoc.running.checkpointed import Checkpoint
from kfoc.running.progress import Progress
from kfoc.samples.inputs import Rows
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
    "Fisher",
    "Gaussian",
    "GroupedBlock",
    "HeteroscedasticGaussian",
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
    "SampleWeighted",
    "ShardedCurvature",
    "Solution",
    "State",
    "Tracker",
    "Treatment",
    "Unsupported",
    "Validation",
    "fit",
    "influence",
    "nearest_kronecker",
    "nearest_kronecker_of_samples",
    "next_token",
    "register",
    "self_influence",
]

__version__ = "0.1.0"
