"""The two halves of a common layer around its attention, and their gradients, as functions of tensors to be compiled.

All passes over the tokens that lie between two matrix products become one kernel. What a gradient needs and does not
get is computed again. Norms, rotation and gate compute in fp32 and round where the layer's own code does. The code is
so plain that the compiler of any version of torch takes it. Axes: `T` tokens, `d` width of the model, `H` heads, `D`
width of a head, `f` width of the gate.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from upturn.models._layer_weights import Eps, Weights

NAMES = Weights._fields
Grads = tuple[Tensor | None, ...]
"""Those of the weights that are wanted, in the order of `Weights`, None for the others."""


def enter(x: Tensor, cos: Tensor, sin: Tensor, w: Weights, eps: Eps, width: int) -> tuple[Tensor | None, ...]:
    """`x [T, d]` -> rotated queries and keys, values, `[T, H, D]` each; then queries and keys before their own norms,
    `[T, H, D]` of both, None where there are none."""
    heads = _heads(norm(x, w.norm, eps[0]), w, width)
    q, k, v = heads.split([len(w.q) // width, len(w.k) // width, len(w.v) // width], 1)
    is_normed = w.q_norm is not None or w.k_norm is not None
    raw = heads[:, : -v.shape[1]].contiguous() if is_normed else None
    q = q if w.q_norm is None else norm(q, w.q_norm, eps[2])
    k = k if w.k_norm is None else norm(k, w.k_norm, eps[3])
    return rotated(q, cos, sin), rotated(k, cos, sin), v.contiguous(), raw


def enter_back(
    gs: tuple[Tensor, Tensor, Tensor, Tensor],
    x: Tensor,
    raw: Tensor | None,
    around: tuple[Tensor, Tensor],
    w: Weights,
    eps: Eps,
    wanted: tuple[bool, ...],
) -> tuple[Tensor, Grads]:
    """The gradient of `x`, given those of what `enter` gave and of the `x` that went past it."""
    g_q, g_k, g_v, past = gs
    cos, sin = around
    found: dict[str, Tensor] = {}
    g_q, g_k = rotated_back(g_q, cos, sin), rotated_back(g_k, cos, sin)
    if raw is not None and w.q_norm is not None:
        g_q, found["q_norm"] = norm_back(raw[:, : g_q.shape[1]], w.q_norm, eps[2], g_q)
    if raw is not None and w.k_norm is not None:
        g_k, found["k_norm"] = norm_back(raw[:, g_q.shape[1] :], w.k_norm, eps[3], g_k)
    g = torch.cat([g_q, g_k, g_v], 1).flatten(1)
    sizes = (len(w.q), len(w.k), len(w.v))
    found["q"], found["k"], found["v"] = (g.t() @ norm(x, w.norm, eps[0])).split(sizes)
    found["q_bias"], found["k_bias"], found["v_bias"] = _sum(g).split(sizes)
    g_x, found["norm"] = norm_back(x, w.norm, eps[0], g @ torch.cat([w.q, w.k, w.v]), past)
    return g_x, _wanted(found, wanted)


def leave(x: Tensor, attended: Tensor, w: Weights, eps: Eps) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`x [T, d]` and what was attended to, `[T, H D]` -> the layer's output, and on the way what enters its second
    norm, `[T, d]`, and the inputs of the gate, `[T, f]` each."""
    middle = x + functional.linear(attended, w.o, w.o_bias)
    gate, up = _gate_up(norm(middle, w.mlp_norm, eps[1]), w)
    product = functional.silu(gate) * up
    return middle + functional.linear(product, w.down, w.down_bias), middle, gate, up


def leave_back(
    g: Tensor,
    middle: Tensor,
    attended: Tensor,
    gates: tuple[Tensor, Tensor] | None,
    w: Weights,
    eps: Eps,
    wanted: tuple[bool, ...],
) -> tuple[Tensor, Tensor, Grads]:
    """The gradients of `x` and of what was attended to, given that of the layer's output."""
    h = norm(middle, w.mlp_norm, eps[1])
    gate, up = _gate_up(h, w) if gates is None else gates
    g_product, wide = (g @ w.down).float(), gate.float()
    open_ = torch.sigmoid(wide)
    silu = wide * open_
    g_up = (g_product * silu).to(g.dtype)
    g_gate = (g_product * up.float() * open_ * (1 + wide * (1 - open_))).to(g.dtype)
    found = {"down": g.t() @ (silu.to(g.dtype) * up), "gate": g_gate.t() @ h, "up": g_up.t() @ h}
    found["down_bias"], found["gate_bias"], found["up_bias"] = _sum(g), _sum(g_gate), _sum(g_up)
    g_middle, found["mlp_norm"] = norm_back(middle, w.mlp_norm, eps[1], g_gate @ w.gate + g_up @ w.up, g)
    found["o"], found["o_bias"] = g_middle.t() @ attended, _sum(g_middle)
    return g_middle, g_middle @ w.o, _wanted(found, wanted)


def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMS norm over the last axis."""
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype)


def norm_back(x: Tensor, weight: Tensor, eps: float, g: Tensor, past: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The gradients of `x`, with that which came `past` the norm, and of the weight."""
    wide, g_wide = x.float(), g.float()
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    flat = wide * scale
    g_flat = g_wide * weight.float()
    g_x = scale * (g_flat - flat * (g_flat * flat).mean(-1, keepdim=True))
    g_x = g_x if past is None else g_x + past.float()
    g_weight = (g_wide * flat.to(x.dtype).float()).flatten(0, -2).sum(0)
    return g_x.to(x.dtype), g_weight.to(weight.dtype)


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of heads, `[T, H, D]` by `[T, D]`."""
    one, two = x.chunk(2, -1)
    return x * cos[:, None] + torch.cat((-two, one), -1) * sin[:, None]


def rotated_back(g: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The gradient of what was rotated."""
    one, two = (g * sin[:, None]).chunk(2, -1)
    return g * cos[:, None] + torch.cat((two, -one), -1)


def _heads(h: Tensor, w: Weights, width: int) -> Tensor:
    """Queries, keys and values by one product, `[T, d] -> [T, all heads, D]`."""
    bias = None
    if w.q_bias is not None or w.k_bias is not None or w.v_bias is not None:
        bias = torch.cat([_bias(w.q, w.q_bias), _bias(w.k, w.k_bias), _bias(w.v, w.v_bias)])
    return functional.linear(h, torch.cat([w.q, w.k, w.v]), bias).view(len(h), -1, width)


def _bias(weight: Tensor, bias: Tensor | None) -> Tensor:
    return weight.new_zeros(len(weight)) if bias is None else bias


def _gate_up(h: Tensor, w: Weights) -> tuple[Tensor, Tensor]:
    return functional.linear(h, w.gate, w.gate_bias), functional.linear(h, w.up, w.up_bias)


def _sum(g: Tensor) -> Tensor:
    """The gradient of a bias."""
    return g.float().sum(0).to(g.dtype)


def _wanted(found: dict[str, Tensor], wanted: tuple[bool, ...]) -> Grads:
    grads: list[Tensor | None] = []
    for place, name in enumerate(NAMES):
        grads.append(found[name] if wanted[place] and name in found else None)
    return tuple(grads)
