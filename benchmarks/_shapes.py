"""Models of a known shape with random weights: what a step costs depends on sizes, not on values."""

from __future__ import annotations

from typing import Any

import torch

from upturn.models import load

SHAPES: dict[str, dict[str, Any]] = {
    "qwen2.5-0.5b": {
        "hidden_size": 896,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "intermediate_size": 4864,
    },
    "qwen2.5-1.5b": {
        "hidden_size": 1536,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "intermediate_size": 8960,
    },
}
"""The published sizes of Qwen2.5."""
VOCABULARY, THETA = 151936, 1e6


def config(shape: str) -> Any:
    """The shape as a config of transformers."""
    from transformers import Qwen2Config

    return Qwen2Config(
        **SHAPES[shape],
        vocab_size=VOCABULARY,
        max_position_embeddings=32768,
        rope_parameters={"rope_type": "default", "rope_theta": THETA},
        tie_word_embeddings=True,
    )


def random(shape: str, like: load.Loaded, device: str) -> load.Loaded:
    """A model in bfloat16, made on the device. The tokenizer is that of a smaller one: all its ids are valid here."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config(shape), dtype=torch.bfloat16, attn_implementation="sdpa")
    return load.Loaded(model.eval(), like.tokenizer, shape, like.end_ids)
