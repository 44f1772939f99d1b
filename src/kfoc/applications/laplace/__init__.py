"""Laplace approximation: the Gaussian around trained parameters that a curvature gives."""

from kfoc.applications.laplace.evidence import DataFit
from kfoc.applications.laplace.posterior import Laplace
from kfoc.applications.laplace.predictive import OutputGaussian

__all__ = ["DataFit", "Laplace", "OutputGaussian"]
