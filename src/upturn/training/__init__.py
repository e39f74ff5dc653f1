"""Learning from pairs: which rows, which batches, and the optimizer step."""
