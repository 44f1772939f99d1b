"""Matrices: symmetric products, scales and norms, eigendecompositions."""
