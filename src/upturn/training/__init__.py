"""Learning from pairs and groups: which samples, which batches, and the optimizer step."""
