"""Names and tensors, matrices by layer, one vector; and which parameters are covered."""
