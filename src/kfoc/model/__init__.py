"""One batch through a model: hooks, traces, backward passes, and the samples made of them."""
