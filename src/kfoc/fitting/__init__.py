"""The loop of a fit over data, and the state between batches."""
