"""A decoder layer of the common kind as one autograd function: what it keeps, and the gradient of all its parts.

It keeps what enters the two norms, the rotated heads and what they attended to; norms, scores and the gated product are
computed again in the backward pass, and the inputs of the gate where they are not kept. Axes: `T` tokens, `d` width of
the model, `D` width of a head, `f` width of the gate.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from upturn.models import _common, _kept
from upturn.models._attention import How
from upturn.models._layer_weights import Eps, Weights, weights_of
from upturn.models._tree_attention import Heads, attend, attend_back
from upturn.models._tree_plan import TreePlan
from upturn.models.native import back, ops


@dataclass(frozen=True, slots=True)
class _Around:
    """What a layer computes with besides its weights."""

    cos: Tensor
    """`[T, D]`, as `sin`."""
    sin: Tensor
    plan: TreePlan
    how: How
    eps: Eps
    width: int
    """Of a head."""
    keeps_gates: bool
    """Whether the inputs of the gate wait for the backward pass."""
    piece: _kept.Piece
    """Where the layer puts what it keeps."""


class Fused:
    """The forward of one layer."""

    __slots__ = ("_eps", "_how", "_layer", "_weights", "_width", "keeps_gates", "piece")

    def __init__(self, layer: Any, how: How) -> None:
        self._layer, self.keeps_gates = layer, True
        self._weights, self._eps = weights_of(layer)
        self._how = how
        self._width = layer.self_attn.head_dim
        self.piece = _kept.Piece()

    def kept_bytes(self, tokens: int) -> list[int]:
        """What the layer keeps of so many tokens, tensor by tensor."""
        w = self._weights
        heads, raw = len(w.q) + len(w.k) + len(w.v), 0 if w.q_norm is None else len(w.q) + len(w.k)
        widths = (heads, raw, w.o.shape[1], len(w.o), len(w.down))
        each = [tokens * width * w.q.element_size() for width in widths]
        return [*each, self.gates_bytes(tokens)] if self.keeps_gates else each

    def gates_bytes(self, tokens: int) -> int:
        """What the inputs of the gate take."""
        return self._weights.gates_bytes(tokens)

    def __call__(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if not _common.is_usual(self._layer, hidden_states, kwargs):
            return _common.plain(self._layer, hidden_states, *args, **kwargs)
        cos, sin = kwargs["position_embeddings"]
        around = _Around(
            cos[0], sin[0], kwargs["upturn_plan"], self._how, self._eps, self._width, self.keeps_gates, self.piece
        )
        out = _Layer.apply(hidden_states[0], around, *self._weights)
        self.piece.close()
        return out[None]  # type: ignore[index]


class _Layer(torch.autograd.Function):
    """`x [T, d] -> [T, d]`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, around: _Around, *weights: Tensor | None) -> Tensor:
        w = Weights(*weights)  # type: ignore[arg-type]
        keep = partial(around.piece.empty, x, len(x))
        heads, raw = _heads(x, around, w)
        attended = keep(w.o.shape[1])
        units = around.plan.units(around.how.window)
        attend(heads, units, around.how.scaling, attended.view(len(x), -1, around.width))
        added = back.product(attended, w.o.t(), w.o_bias)
        middle, h = ops.norm(x, w.mlp_norm, around.eps[1], added, keep(len(w.o)))
        gate_up: Tensor | None = _gate_up(h, w, keep(2 * len(w.gate)) if around.keeps_gates else None)
        product = ops.silu_mul(gate_up)
        gate_up = gate_up if around.keeps_gates else None  # the other product finds its memory free
        out = back.product(product, w.down.t(), w.down_bias, out=keep(len(w.down))).add_(middle)
        ctx.around, ctx.kv_heads = around, heads.kv_heads
        ctx.save_for_backward(x, heads.all, raw, attended, middle, gate_up, *weights)
        return out

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, all_heads, raw, attended, middle, gate_up, *weights = ctx.saved_tensors
        w = Weights(*weights)
        grads = _Grads(w, ctx.needs_input_grad[2:])
        g_middle = _mlp_back(g.contiguous(), middle, gate_up, ctx.around, w, grads)
        grads.linears("o", g_middle, attended)
        g_heads = _attention_back(
            back.product(g_middle, w.o), Heads(all_heads, ctx.kv_heads), raw, ctx.around, w, grads
        )
        _, h = ops.norm(x, w.norm, ctx.around.eps[0])
        grads.linears("q k v", g_heads.all.flatten(1), h)
        q, k, v = (part.flatten(1) for part in g_heads.parts)
        g_x = back.product(q, w.q)
        for part, weight in ((k, w.k), (v, w.v)):
            back.add_product_(g_x, part, weight)
        grads["norm"] = _norm_back_(x, w.norm, ctx.around.eps[0], g_x, g_middle)
        return g_x, None, *grads.tensors


def _heads(x: Tensor, around: _Around, w: Weights) -> tuple[Heads, Tensor | None]:
    """Rotated queries and keys, and values; queries and keys before that where a norm of theirs needs them."""
    _, h = ops.norm(x, w.norm, around.eps[0])
    sizes = (len(w.q), len(w.k), len(w.v))
    joined = around.piece.empty(h, len(h), sum(sizes))
    linears = ((w.q, w.q_bias), (w.k, w.k_bias), (w.v, w.v_bias))
    for part, (weight, bias) in zip(joined.split(sizes, 1), linears, strict=True):
        back.product(h, weight.t(), bias, out=part)
    heads = Heads(joined.view(len(h), -1, around.width), len(w.k) // around.width)
    q, k, _ = heads.parts
    raw = None
    if w.q_norm is not None:
        both = heads.all[:, : -heads.kv_heads]
        raw = around.piece.empty(h, *both.shape).copy_(both)
    for part, scale, eps in ((q, w.q_norm, around.eps[2]), (k, w.k_norm, around.eps[3])):
        ops.rope_(part, around.cos, around.sin, scale, eps)
    return heads, raw


def _gate_up(h: Tensor, w: Weights, out: Tensor | None = None) -> Tensor:
    """The inputs of the gate, `[T, d] -> [T, 2 f]`, into `out` where it is given."""
    out = h.new_empty(len(h), 2 * len(w.gate)) if out is None else out
    for part, weight, bias in zip(out.chunk(2, 1), (w.gate, w.up), (w.gate_bias, w.up_bias), strict=True):
        back.product(h, weight.t(), bias, out=part)
    return out


def _mlp_back(g: Tensor, middle: Tensor, gate_up: Tensor | None, around: _Around, w: Weights, grads: _Grads) -> Tensor:
    """The gradient of what enters the gated half of a layer."""
    _, h = ops.norm(middle, w.mlp_norm, around.eps[1])
    g_gate_up, product = back.silu_mul_back(_gate_up(h, w) if gate_up is None else gate_up, back.product(g, w.down))
    grads.linears("down", g, product)
    del product
    g_gate, g_up = g_gate_up.chunk(2, 1)
    grads.linears("gate up", g_gate_up, h)
    g_middle = back.add_product_(back.product(g_gate, w.gate), g_up, w.up)
    grads["mlp_norm"] = _norm_back_(middle, w.mlp_norm, around.eps[1], g_middle, g)
    return g_middle


def _attention_back(g: Tensor, heads: Heads, raw: Tensor | None, around: _Around, w: Weights, grads: _Grads) -> Heads:
    """The gradient of queries, keys and values as the products made them."""
    units, scaling = around.plan.units(around.how.window), around.how.scaling
    g_heads = attend_back(heads, g.view(len(g), -1, around.width), units, around.plan.copies(heads.kv_heads), scaling)
    q, k, _ = g_heads.parts
    for part in (q, k):
        back.rope_back_(part, around.cos, around.sin)
    if raw is not None:
        at = q.shape[1]
        for name, part, before, eps in (
            ("q_norm", q, raw[:, :at], around.eps[2]),
            ("k_norm", k, raw[:, at:], around.eps[3]),
        ):
            grads[name] = back.norm_back(before, getattr(w, name), eps, part, part)
    return g_heads


def _norm_back_(x: Tensor, weight: Tensor, eps: float, g: Tensor, past: Tensor) -> Tensor:
    """`g [T, d]` becomes the gradient of `x`, with that which came `past` the norm; returns that of the weight."""
    return back.norm_back(x[:, None], weight, eps, g[:, None], g[:, None], past[:, None])


class _Grads:
    """The gradients of the weights, those that are wanted."""

    def __init__(self, w: Weights, wanted: tuple[bool, ...]) -> None:
        self._wanted = dict(zip(w._fields, wanted, strict=True))
        self._rows = {name: len(weight) for name, weight in w._asdict().items() if weight is not None}
        self._found: dict[str, Tensor] = {}

    def __setitem__(self, name: str, grad: Tensor) -> None:
        self._found[name] = grad

    def linears(self, names: str, g: Tensor, x: Tensor) -> None:
        """Those of linear layers side by side with input `x` and output gradient `g`."""
        each = names.split()
        if not any(self._wanted[name] or self._wanted[f"{name}_bias"] for name in each):
            return
        sizes = [self._rows[name] for name in each]
        self._found |= zip(each, back.weight_gradient(g, x).split(sizes), strict=True)
        if any(self._wanted[f"{name}_bias"] for name in each):
            self._found |= zip((f"{name}_bias" for name in each), g.sum(0).split(sizes), strict=True)

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """In the order of `Weights`, None where none is wanted."""
        return tuple(self._found.get(name) if wanted else None for name, wanted in self._wanted.items())
