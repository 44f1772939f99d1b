"""What a model's outputs mean: cotangents of the Fisher types, a file a likelihood."""
