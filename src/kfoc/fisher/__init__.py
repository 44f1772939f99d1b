"""The true Fisher of all layers together, never formed: products with it, and exact solves."""
