"""What one layer saw in one batch, by kinds: inputs a and output derivatives g."""
