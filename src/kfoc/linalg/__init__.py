"""Matrices: symmetric products, scales and norms, eigendecompositions, conjugate gradients."""
