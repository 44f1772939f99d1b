"""What a fit can do beside its loop: checkpoints, groups of layers, progress."""
