"""What people do with a curvature."""
