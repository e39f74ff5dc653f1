"""Operations and bytes of a training step and of a decode step, by formula from a Llama-like config.

A fused multiply-add is two operations. Norms, rotary embeddings and activations are left out: they are work of bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

BF16, FP32 = 2, 4
"""Bytes of a number."""


@dataclass(frozen=True, slots=True)
class Shape:
    """The sizes that matter."""

    layers: int
    width: int
    heads: int
    key_heads: int
    head_dim: int
    inner: int
    vocab: int

    @property
    def linears(self) -> tuple[tuple[int, int], ...]:
        """(inputs, outputs) of the linear layers of one decoder layer: q, k, v, o, gate, up, down."""
        queries, keys = self.heads * self.head_dim, self.key_heads * self.head_dim
        attention = ((self.width, queries), (self.width, keys), (self.width, keys), (queries, self.width))
        return (*attention, (self.width, self.inner), (self.width, self.inner), (self.inner, self.width))

    @property
    def layer_weights(self) -> int:
        """Weights that multiply, all layers."""
        return self.layers * sum(inputs * outputs for inputs, outputs in self.linears)

    @property
    def head_weights(self) -> int:
        """Weights of the output layer."""
        return self.vocab * self.width


@dataclass(frozen=True, slots=True)
class Work:
    """What a piece of work asks of the machine."""

    flops: float
    bytes: float

    @property
    def intensity(self) -> float:
        """Operations per byte."""
        return self.flops / self.bytes

    def seconds(self, flops_per_second: float, bytes_per_second: float) -> float:
        """The roofline: the longer of arithmetic and memory, as if they overlapped perfectly."""
        return max(self.flops / flops_per_second, self.bytes / bytes_per_second)


def shape(config: Any) -> Shape:
    """From a `transformers` config, or a mapping with the same keys."""
    known: Mapping[str, Any] = config if isinstance(config, Mapping) else config.to_dict()
    heads, width = known["num_attention_heads"], known["hidden_size"]
    return Shape(
        layers=known["num_hidden_layers"],
        width=width,
        heads=heads,
        key_heads=known.get("num_key_value_heads") or heads,
        head_dim=known.get("head_dim") or width // heads,
        inner=known["intermediate_size"],
        vocab=known["vocab_size"],
    )


def train(s: Shape, tokens: int, targets: int, pairs: int) -> Work:
    """One micro-batch and its optimizer step: forward and twice that backward; recomputation is not counted as useful.

    tokens    through the layers
    targets   positions through the output layer
    pairs     (query, key) pairs that see each other, the same in every layer
    """
    linear = 6 * (s.layer_weights * tokens + s.head_weights * targets)
    attention = 3 * _attention_flops(s, pairs)
    weights = s.layer_weights + s.head_weights
    moved = weights * 3 * BF16  # read forward, read backward, gradient written
    moved += weights * (BF16 + 2 * FP32)  # gradient summed in fp32
    moved += weights * (2 * (FP32 + BF16 + FP32) + FP32)  # master and both moments read and written, sum read
    activations = s.layers * sum(inputs + outputs for inputs, outputs in s.linears) * tokens
    activations += (s.width + s.vocab) * targets
    return Work(linear + attention, moved + 3 * BF16 * activations)


def decode(s: Shape, tokens: int, chosen: int, keys: int) -> Work:
    """One forward pass of the engine.

    tokens    new tokens through the layers
    chosen    positions through the output layer
    keys      (query, key) pairs; each key is read once per query
    """
    flops = 2 * (s.layer_weights * tokens + s.head_weights * chosen) + _attention_flops(s, keys)
    weights = BF16 * (s.layer_weights + s.head_weights)
    cache = BF16 * 2 * s.layers * s.key_heads * s.head_dim * keys
    return Work(flops, weights + cache + FP32 * s.vocab * chosen)


def _attention_flops(s: Shape, pairs: int) -> int:
    """Scores and weighted values."""
    return 4 * s.layers * s.heads * s.head_dim * pairs
