"""Decoder layers in fewer passes over memory, for the time of a generation on a CPU.

A layer of the common kind (RMS norm, attention with rotary embeddings, gated MLP with SiLU; Llama, Mistral, Qwen and
relatives) spends more time in some forty small operations than in its matrix products. Here the three products that
share an input are one, over packed weights, and what lies between them is a few kernels (`native`). Any other layer
keeps its own forward: each one is asked once whether it computes the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from upturn.models import _attention, _common, _gpu_layer, _slow, packed
from upturn.models._attention import How
from upturn.models.native import on_gpu, ops

_Products = tuple[packed.Product, packed.Product, packed.Gated, packed.Product]
"""Queries, keys and values; what was attended to; gate and up; down."""
SHORT = 256
"""Tokens of a first context that go through the plain layers."""


@contextmanager
def fused(model: nn.Module, held: dict[Any, Any] | None = None) -> Iterator[None]:
    """Inside, common layers compute fused, and the other linear layers from packed weights (`packed`).

    Joined weights go when the block ends; weights must not change within it. They take as much memory again. On a GPU
    `held` keeps them at their place from one block to the next, for graphs that know it.
    """
    _attention.use_plans(model)
    if on_gpu(next(model.parameters())):
        with _common.swapped(_gpu_layer.gpu_layers(model, {} if held is None else held)):
            yield
        return
    _slow.tell(model, (part for part in model.modules() if isinstance(part, nn.Linear) and not ops.usable(part.weight)))
    common = ((layer, _forward(layer)) for layer in _common.layers_of(model) if has_kernels(layer))
    forwards = {layer: forward for layer, forward in common if forward}
    with _common.swapped(forwards), packed.packed(model, besides=forwards.keys()):
        yield


class _Maybe:
    """The forward of one layer: plain for a first short context, then fused if that was found to compute the same.

    To try it and to join the weights takes longer than the first token, which somebody may be waiting for. With our own
    product it takes a tenth of a second, so those are `fused` from the first step on.
    """

    __slots__ = ("_fused", "_is_new", "_layer")

    def __init__(self, layer: nn.Module, fused: _Fused | None = None) -> None:
        self._layer, self._is_new, self._fused = layer, True, fused

    def __call__(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        is_first, self._is_new = self._is_new, False
        if not _common.is_usual(self._layer, hidden_states, kwargs):
            return _common.plain(self._layer, hidden_states, *args, **kwargs)
        waits = is_first and hidden_states.shape[1] <= SHORT
        if self._fused is None and not waits:
            self._fused = _try(self._layer)
        return (self._fused or partial(_common.plain, self._layer))(hidden_states, *args, **kwargs)


class _Fused:
    """A layer over joined weights, which it makes when it is first called."""

    __slots__ = ("_attention", "_layer", "_products", "_whole", "how")

    def __init__(self, layer: nn.Module, how: How) -> None:
        self._layer: Any = layer
        self.how = how
        self._attention = self._layer.self_attn
        self._products: _Products | None = None
        self._whole: ops.Layer | None = None

    def __call__(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self._products is None:
            self._products = self._join()
            self._whole = _whole(self._layer, self.how, self._products)
        x, (cos, sin), plan = hidden_states[0], kwargs["position_embeddings"], kwargs["upturn_plan"]
        if self._whole is not None and hasattr(plan, "run") and plan.takes(self._whole, x):
            return plan.run(self._attention.layer_idx, self._whole, x, (cos[0], sin[0]))[None]
        return self._run(x, cos[0], sin[0], plan)[None]

    def _join(self) -> _Products:
        a, mlp = self._attention, self._layer.mlp
        join, out, narrow = (packed.Product(g) for g in ((a.q_proj, a.k_proj, a.v_proj), (a.o_proj,), (mlp.down_proj,)))
        return join, out, packed.Gated(mlp.gate_proj, mlp.up_proj), narrow

    def _run(self, x: Tensor, cos: Tensor, sin: Tensor, plan: _attention.Plan) -> Tensor:
        assert self._products is not None
        layer, attention = self._layer, self._attention
        join, out, widen, narrow = self._products
        before, after = layer.input_layernorm, layer.post_attention_layernorm
        _, h = ops.norm(x, before.weight, before.variance_epsilon)
        heads = join(h).view(len(x), -1, attention.head_dim)
        keys = attention.k_proj.out_features // attention.head_dim
        q, k, v = heads.split((heads.shape[1] - 2 * keys, keys, keys), 1)
        for part, norm in ((q, "q_norm"), (k, "k_norm")):
            own = getattr(attention, norm, None)
            ops.rope_(part, cos, sin, own and own.weight, own.variance_epsilon if own else 0.0)
        q, k, v = (part.transpose(0, 1)[None] for part in (q, k, v))
        attended = plan.attend(attention.layer_idx, q, k, v, self.how)
        x, h = ops.norm(x, after.weight, after.variance_epsilon, out(attended.view(len(x), -1)))
        return x + narrow(widen(h))


def _whole(layer: Any, how: How, products: _Products) -> ops.Layer | None:
    """The layer in one piece, where all its products are our own."""
    if any(product.panels is None for product in products):
        return None
    a, before, after = layer.self_attn, layer.input_layernorm, layer.post_attention_layernorm
    q_norm, k_norm = (getattr(a, name, None) for name in ("q_norm", "k_norm"))
    tensors: dict[str, Tensor | None] = {
        "before": before.weight,
        "after": after.weight,
        "q_norm": None if q_norm is None else q_norm.weight,
        "k_norm": None if k_norm is None else k_norm.weight,
    }
    for name, product in zip(("join", "out", "widen", "narrow"), products, strict=True):
        tensors |= {name: product.panels, f"{name}_bias": product.bias}
    return ops.Layer(
        width=layer.mlp.down_proj.out_features,
        heads=a.q_proj.out_features // a.head_dim,
        kv_heads=a.k_proj.out_features // a.head_dim,
        d=a.head_dim,
        wide=2 * layer.mlp.gate_proj.out_features,
        window=how.window or 0,
        before_eps=before.variance_epsilon,
        after_eps=after.variance_epsilon,
        q_eps=q_norm.variance_epsilon if q_norm else 0.0,
        k_eps=k_norm.variance_epsilon if k_norm else 0.0,
        scale=how.scaling,
        cap=how.softcap or 0.0,
        **{name: None if tensor is None else tensor.data_ptr() for name, tensor in tensors.items()},
    )


def has_kernels(layer: nn.Module) -> bool:
    """Whether a layer is common, and kernels take what it computes with."""
    return _common.is_common(layer) and ops.usable(next(layer.parameters()))


def _forward(layer: nn.Module) -> _Maybe | None:
    """That of a common layer, None where it is known to be its own. With our own product it is tried at once, and every
    step is fused: bits never depend on what a step brings along, nor on whether it is the first of the process."""
    if not ops.has_product(next(layer.parameters()).dtype):
        return _Maybe(layer) if _SEEN.get(layer, True) else None
    fused = _try(layer)
    return _Maybe(layer, fused) if fused else None


def _try(layer: nn.Module) -> _Fused | None:
    """The layer over joined weights, if it was found to compute the same."""
    if layer in _SEEN:
        how = _SEEN[layer]
        return _Fused(layer, how) if how else None
    fused = _same(layer)
    _SEEN[layer] = fused and fused.how
    return fused


_SEEN: WeakKeyDictionary[nn.Module, How | None] = WeakKeyDictionary()
"""How a common layer attends, None where fused it computes something else."""


@torch.inference_mode()
def _same(layer: nn.Module) -> _Fused | None:
    (x, around), own, ours = _common.probe(layer), _common.Causal(), _common.Causal()
    out = _common.tried(partial(_common.plain, layer, x, **around, upturn_plan=own))
    if out is None or own.how is None:
        return None
    fused = _Fused(layer, own.how)
    other = _common.tried(partial(fused, x, **around, upturn_plan=ours))
    pairs = [] if other is None else [(out, other), *zip(own.seen, ours.seen, strict=True)]
    return fused if pairs and all(_common.close(one, two) for one, two in pairs) else None
