"""Answers from a model: batched sampling with a KV cache."""
