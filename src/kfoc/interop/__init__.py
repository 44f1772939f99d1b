"""What other libraries bring: their layers, and their forms of a curvature."""
