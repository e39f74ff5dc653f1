"""Decoder layers that learn, in fewer passes over memory and with less of it kept, for training on a CPU.

The counterpart of `fused` for log-probs of trees: the same kind of layer, one autograd function each. It keeps what
enters the two norms, the rotated heads and what they attended to; norms, scores and the gated product are computed
again in the backward pass. So are the inputs of the gate where memory is short: they are half of what a layer holds and
a twelfth of a step. Either way gives the same bits. Every weight stays a parameter and gets its own gradient.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from upturn import trees
from upturn.models import _attention, _memory, fused
from upturn.models._attention import How
from upturn.models._tree_attention import Heads, attend, attend_back
from upturn.models._tree_plan import TreePlan
from upturn.models.native import back, ops
from upturn.types import Sample

SHARE_OF_FREE = 8
"""The inputs of all gates may take one part in so many of the memory that is free."""
NEAR = 0.2
"""How far bfloat16 kernels may be from exact ones, relative to the largest number: one that errs is further."""


@contextmanager
def fused_training(model: nn.Module, plan: TreePlan) -> Iterator[None]:
    """Inside, the forward pass of common layers is fused where the plan is that of a CPU. The backward pass may follow
    outside."""
    _attention.use_plans(model)
    known = {} if plan.flex else {layer: how for layer in fused.layers_of(model) if (how := _fusable(layer))}
    layers: list[Any] = [*known]
    keeps_gates = SHARE_OF_FREE * _gates_bytes(layers, len(plan.tree.ids_T)) <= _memory.free()
    for layer in layers:
        layer.forward = _Fused(layer, known[layer], keeps_gates=keeps_gates)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def _gates_bytes(layers: Iterable[Any], tokens: int) -> int:
    """What the inputs of all gates take."""
    weights: list[Tensor] = [layer.mlp.gate_proj.weight for layer in layers]
    return sum(2 * tokens * len(weight) * weight.element_size() for weight in weights)


class _Weights(NamedTuple):
    """The parameters of a layer, each a weight and, or a norm's, None where there is none."""

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


@dataclass(frozen=True, slots=True)
class _Around:
    """What a layer computes with besides its weights."""

    cos: Tensor
    """`[T, D]`, as `sin`."""
    sin: Tensor
    plan: TreePlan
    how: How
    eps: tuple[float, float, float, float]
    """Of both norms of the layer, and of those of queries and keys."""
    width: int
    """Of a head."""
    keeps_gates: bool
    """Whether the inputs of the gate wait for the backward pass."""


class _Fused:
    """The forward of one layer."""

    __slots__ = ("_eps", "_how", "_keeps_gates", "_layer", "_weights", "_width")

    def __init__(self, layer: Any, how: How, *, keeps_gates: bool) -> None:
        self._layer, self._keeps_gates = layer, keeps_gates
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
        self._weights = _Weights(*weights)
        inner = [0.0 if norm is None else norm.variance_epsilon for norm in norms]
        self._eps = (before.variance_epsilon, after.variance_epsilon, inner[0], inner[1])
        self._how = how
        self._width = a.head_dim

    def __call__(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if not fused.is_usual(self._layer, hidden_states, kwargs):
            return fused.plain(self._layer, hidden_states, *args, **kwargs)
        cos, sin = kwargs["position_embeddings"]
        around = _Around(cos[0], sin[0], kwargs["upturn_plan"], self._how, self._eps, self._width, self._keeps_gates)
        return _Layer.apply(hidden_states[0], around, *self._weights)[None]  # type: ignore[index]


class _Layer(torch.autograd.Function):
    """`x [T, d] -> [T, d]`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, around: _Around, *weights: Tensor | None) -> Tensor:
        w = _Weights(*weights)  # type: ignore[arg-type]
        heads, raw = _heads(x, around, w)
        attended = attend(heads, around.plan.units(around.how.window), around.how.scaling).flatten(1)
        added = back.product(attended, w.o.t(), w.o_bias)
        middle, h = ops.norm(x, w.mlp_norm, around.eps[1], added)
        gate_up: Tensor | None = _gate_up(h, w)
        product = ops.silu_mul(gate_up)
        gate_up = gate_up if around.keeps_gates else None  # the other product finds its memory free
        out = back.product(product, w.down.t(), w.down_bias).add_(middle)
        ctx.around, ctx.kv_heads = around, heads.kv_heads
        ctx.save_for_backward(x, heads.all, raw, attended, middle, gate_up, *weights)
        return out

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, all_heads, raw, attended, middle, gate_up, *weights = ctx.saved_tensors
        w = _Weights(*weights)
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


def _heads(x: Tensor, around: _Around, w: _Weights) -> tuple[Heads, Tensor | None]:
    """Rotated queries and keys, and values; queries and keys before that where a norm of theirs needs them."""
    _, h = ops.norm(x, w.norm, around.eps[0])
    sizes = (len(w.q), len(w.k), len(w.v))
    joined = h.new_empty(len(h), sum(sizes))
    linears = ((w.q, w.q_bias), (w.k, w.k_bias), (w.v, w.v_bias))
    for part, (weight, bias) in zip(joined.split(sizes, 1), linears, strict=True):
        back.product(h, weight.t(), bias, out=part)
    heads = Heads(joined.view(len(h), -1, around.width), len(w.k) // around.width)
    q, k, _ = heads.parts
    raw = None if w.q_norm is None else heads.all[:, : -heads.kv_heads].clone()
    for part, scale, eps in ((q, w.q_norm, around.eps[2]), (k, w.k_norm, around.eps[3])):
        ops.rope_(part, around.cos, around.sin, scale, eps)
    return heads, raw


def _gate_up(h: Tensor, w: _Weights) -> Tensor:
    """The inputs of the gate, `[T, d] -> [T, 2 f]`."""
    out = h.new_empty(len(h), 2 * len(w.gate))
    for part, weight, bias in zip(out.chunk(2, 1), (w.gate, w.up), (w.gate_bias, w.up_bias), strict=True):
        back.product(h, weight.t(), bias, out=part)
    return out


def _mlp_back(g: Tensor, middle: Tensor, gate_up: Tensor | None, around: _Around, w: _Weights, grads: _Grads) -> Tensor:
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


def _attention_back(g: Tensor, heads: Heads, raw: Tensor | None, around: _Around, w: _Weights, grads: _Grads) -> Heads:
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

    def __init__(self, w: _Weights, wanted: tuple[bool, ...]) -> None:
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
        """In the order of `_Weights`, None where none is wanted."""
        return tuple(self._found.get(name) if wanted else None for name, wanted in self._wanted.items())


def _fusable(layer: nn.Module) -> How | None:
    """How a common layer attends, if it was found to compute the same, gradients too."""
    if not fused.is_common(layer) or layer.self_attn.head_dim > back.MOST_WIDTH:  # type: ignore[union-attr,operator]
        return None
    if layer not in _SEEN:
        _SEEN[layer] = _computes_the_same(layer)
    return _SEEN[layer]


_SEEN: WeakKeyDictionary[nn.Module, How | None] = WeakKeyDictionary()


def _computes_the_same(layer: nn.Module) -> How | None:
    """Both ways on a tree of two branches: the output, and the gradients of input and weights.

    In fp32, since the rounding of bfloat16 changes some gradients as much as another kind of layer would. What the
    layer's own type gives need only come near that.
    """
    with torch.inference_mode(False), torch.enable_grad():
        exact = fused.tried(lambda: copy.deepcopy(layer).float())
        how = None if exact is None else fused.asked_by(exact)
        if exact is None or how is None or how.softcap:
            return None
        plan = TreePlan(trees.build([Sample((0,), (1, 2)), Sample((0,), (3, 4))]), flex=False)
        plain = _learnt(exact, partial(fused.plain, exact), plan)
        same = _learnt(exact, _Fused(exact, how, keeps_gates=True), plan)
        is_exact = next(layer.parameters()).dtype == torch.float32
        own = same if is_exact else _learnt(layer, _Fused(layer, how, keeps_gates=True), plan)
    if not plain or not same or not own or not all(map(fused.close, plain, same)):
        return None
    return how if all(map(_near, same, own)) else None


def _near(exact: Tensor, own: Tensor) -> bool:
    return bool((exact - own).abs().max() <= NEAR * exact.abs().max())


def _learnt(layer: nn.Module, forward: Any, plan: TreePlan) -> list[Tensor] | None:
    """The output, and the gradients of its sum of squares; None where it fails."""
    x, around = fused.probe(layer)
    inputs = [x.clone().requires_grad_(), *(p for p in layer.parameters() if p.requires_grad)]

    def work() -> list[Tensor]:
        out = forward(inputs[0], **around, upturn_plan=plan)
        return [out.detach(), *torch.autograd.grad(out.float().square().sum(), inputs)]

    return fused.tried(work)
