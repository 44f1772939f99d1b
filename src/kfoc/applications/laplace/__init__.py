"""Laplace approximation: the Gaussian around trained parameters that a curvature gives."""

from kfoc.applications.laplace.evidence import DataFit
from kfoc.applications.laplace.posterior import Laplace
from kfoc.applications.laplace.predictive import OutputGaussian
from kfoc.applications.laplace.validation import Validation

__all__ = ["DataFit", "Laplace", "OutputGaussian", "Validation"]
