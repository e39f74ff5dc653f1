"""The parameters of a decoder layer of the common kind, in one order."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor


class Weights(NamedTuple):
    """Each a weight and, or a norm's, None where there is none."""

    norm: Tensor
    q: Tensor
    q_bias: Tensor | None
    k: Tensor
    k_bias: Tensor | None
    v: Tensor
    v_bias: Tensor | None
    q_norm: Tensor | None
    k_norm: Tensor | None
    o: Tensor
    o_bias: Tensor | None
    mlp_norm: Tensor
    gate: Tensor
    gate_bias: Tensor | None
    up: Tensor
    up_bias: Tensor | None
    down: Tensor
    down_bias: Tensor | None

    def apart(self) -> Weights:
        """The same memory as leaves of their own, which no earlier pass has seen."""
        leaves = (None if w is None else w.detach().requires_grad_(w.requires_grad) for w in self)
        return Weights(*leaves)  # type: ignore[arg-type]

    def learning(self) -> list[Tensor]:
        """Those that get a gradient."""
        return [weight for weight in self if weight is not None and weight.requires_grad]

    def gates_bytes(self, tokens: int) -> int:
        """What the inputs of the gate take."""
        return 2 * tokens * len(self.gate) * self.gate.element_size()


Eps = tuple[float, float, float, float]
"""Of both norms of a layer, and of those of queries and keys."""


def weights_of(layer: Any) -> tuple[Weights, Eps]:
    """The parameters of a common layer, and the small numbers of its norms."""
    a, mlp = layer.self_attn, layer.mlp
    norms = [getattr(a, name, None) for name in ("q_norm", "k_norm")]
    before, after = layer.input_layernorm, layer.post_attention_layernorm
    linear = [
        (part.weight, part.bias)
        for part in (a.q_proj, a.k_proj, a.v_proj, a.o_proj, mlp.gate_proj, mlp.up_proj, mlp.down_proj)
    ]
    q, k, v, o, gate, up, down = linear
    scales = [None if norm is None else norm.weight for norm in norms]
    weights: list[Any] = [before.weight, *q, *k, *v, *scales, *o, after.weight, *gate, *up, *down]
    inner = [0.0 if norm is None else norm.variance_epsilon for norm in norms]
    return Weights(*weights), (before.variance_epsilon, after.variance_epsilon, inner[0], inner[1])
