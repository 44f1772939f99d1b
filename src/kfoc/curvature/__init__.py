"""The result of a fit: a block for every layer, its operations, and its file."""
