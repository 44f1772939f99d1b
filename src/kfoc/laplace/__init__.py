"""Laplace approximation: the Gaussian around trained parameters that a curvature gives."""

from kfoc.laplace.evidence import DataFit
from kfoc.laplace.posterior import Laplace
from kfoc.laplace.predictive import OutputGaussian

__all__ = ["DataFit", "Laplace", "OutputGaussian"]
