"""``kfoc compare``: every estimator on a user's own model, layer by layer."""
