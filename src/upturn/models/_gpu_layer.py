"""Decoder layers of the common kind in few kernels, for the time of a generation on a GPU, and attention over slots.

The counterpart of what `fused` does on a CPU: products that share an input are one, and what lies between them is four
kernels (`native.gpu`). No tensor's shape or address changes from one step to the next but with the number of tokens, so
a step can be captured as a CUDA graph.

Axes: `T` tokens of a step, `H` heads, `D` width of a head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from upturn.errors import ModelError
from upturn.models import _common, _memory, _slow, packed
from upturn.models._attention import How

ROOM = 2
"""Joined weights are made where so many times as much memory is free: the other half is for slots."""


def kernels() -> Any:
    """The module `native.gpu`, which needs Triton."""
    return import_module("upturn.models.native.gpu")


def sampler() -> Any:
    """The module `native.gpu_sample`, which needs Triton."""
    return import_module("upturn.models.native.gpu_sample")


def runs(like: Tensor, heads: int, kv_heads: int, width: int) -> bool:
    """Whether the kernels run here for heads of this width; it is said where they do not compile, or find no room."""
    tiles = torch.tensor([[0], [0], [0], [1]], dtype=torch.int32, device=like.device)
    try:
        q, keys = like.new_zeros(1, heads, width), like.new_zeros(1, kv_heads, kernels().KEYS, width)
        kernels().attend(q, tiles, (keys, keys), (1.0, 0.0, 0), torch.empty_like(q))
        sampler().sample(like.new_zeros(1, 8), torch.zeros(1, device=like.device), 1.0)
    except Exception as fault:  # of Triton's import, of the compiler, of the C compiler that it calls, of the driver
        _slow.tell_no_kernels(fault)
        return False
    return True


@dataclass(frozen=True, slots=True)
class KernelPlan:
    """New tokens of some slots, as the kernels take them: a `Plan` for any layer, and more for a common one."""

    keys: Tensor
    """`[layers, slots, Hkv, length, D]`, as `values`."""
    values: Tensor
    slot_T: Tensor
    """int32, as all places."""
    place_T: Tensor
    tiles: Tensor
    """`[4, N]`: see `gpu.attend`."""
    heads: int
    """Of queries, for which the tiles were cut."""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, how: How) -> Tensor:
        """See `Plan`."""
        q_T, k_T, v_T = (part[0].transpose(0, 1) for part in (q, k, v))  # [T, H, D]
        self._check(layer, q_T, (k_T.shape[1], v_T.shape[1]), {k_T.shape[2], v_T.shape[2]}, {k_T.dtype, v_T.dtype})
        slot, place = self.slot_T.long(), self.place_T.long()
        self.keys[layer][slot, :, place] = k_T
        self.values[layer][slot, :, place] = v_T
        return self._attend(layer, q_T.contiguous(), how)[None]

    def turn_and_attend(self, layer: int, joined: Tensor, turn: Any, heads: int, how: How) -> Tensor:
        """Queries, keys and values `[T, (H + 2 Hkv) * D]` before they are turned -> `[T, H * D]`."""
        where, cache = (self.slot_T, self.place_T), (self.keys[layer], self.values[layer])
        width = turn.cos.shape[-1]
        all_T = joined.view(len(joined), -1, width)
        kv_heads = (all_T.shape[1] - heads) // 2
        self._check(layer, all_T[:, :heads], (kv_heads, kv_heads), {width}, {joined.dtype})
        kernels().turn_and_keep(joined, turn, where, cache, heads)
        q_T = all_T[:, :heads]
        return self._attend(layer, q_T, how).flatten(1)

    def _check(self, layer: int, q_T: Tensor, kv_heads: tuple[int, int], widths: set[int], dtypes: set[Any]) -> None:
        """Kernels trust what they are given, so it must be what the config promised."""
        promised, width = self.keys.shape[2], self.keys.shape[4]
        is_kept = kv_heads == (promised, promised) and widths == {width} and dtypes == {self.keys.dtype}
        if not is_kept or q_T.shape[1:] != (self.heads, width) or q_T.dtype != self.keys.dtype:
            raise ModelError(
                f"layer {layer}",
                f"Its heads are {q_T.dtype} {[*q_T.shape[1:]]}, its keys and values {kv_heads} of {widths}, where the "
                f"config of the model promises {self.heads} and {promised} of {self.keys.dtype} [{width}].",
                "Serve this model (`vllm serve`) and name the endpoint instead: upturn asks any.",
            )

    def _attend(self, layer: int, q_T: Tensor, how: How) -> Tensor:
        out_T = torch.empty(q_T.shape, dtype=q_T.dtype, device=q_T.device)
        limits = (how.scaling, how.softcap or 0.0, how.window or 0)
        kernels().attend(q_T, self.tiles, (self.keys[layer], self.values[layer]), limits, out_T)
        return out_T


class GpuLayer:
    """The forward of one layer while a `KernelPlan` runs; with any other plan the layer's own."""

    __slots__ = ("_heads", "_how", "_joined", "_layer")

    def __init__(self, layer: nn.Module, how: How) -> None:
        self._layer: Any = layer
        self._how = how
        attention = self._layer.self_attn
        self._heads = attention.q_proj.out_features // attention.head_dim
        self._joined = [_Joined(parts) for parts in _groups(self._layer)]

    def is_of(self, layer: nn.Module) -> bool:
        """Whether the layer still has the parts whose weights were joined, where and as they were."""
        return all(joined.is_of(parts) for joined, parts in zip(self._joined, _groups(layer), strict=True))

    def addresses(self) -> list[int]:
        """Where the joined weights and biases lie."""
        return [address for joined in self._joined for address in joined.addresses()]

    def refresh(self) -> None:
        """Take over the weights as they are now, where they were before."""
        for joined in self._joined:
            joined.refresh()

    def __call__(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        plan = kwargs.get("upturn_plan")
        if not isinstance(plan, KernelPlan) or not _common.is_usual(self._layer, hidden_states, kwargs):
            return _common.plain(self._layer, hidden_states, *args, **kwargs)
        layer, gpu, (cos, sin) = self._layer, kernels(), kwargs["position_embeddings"]
        before, after, attention, mlp = (
            layer.input_layernorm,
            layer.post_attention_layernorm,
            layer.self_attn,
            layer.mlp,
        )
        x, h = gpu.norm(hidden_states[0], before.weight, before.variance_epsilon)
        norms = [getattr(attention, name, None) for name in ("q_norm", "k_norm")]
        scales = [None if norm is None else norm.weight for norm in norms]
        eps = tuple(0.0 if norm is None else norm.variance_epsilon for norm in norms)
        heads, gates = self._joined
        turn = gpu.Turn(cos[0], sin[0], *scales, eps)
        attended = plan.turn_and_attend(attention.layer_idx, heads(h), turn, self._heads, self._how)
        x, h = gpu.norm(x, after.weight, after.variance_epsilon, attention.o_proj(attended))
        return (x + mlp.down_proj(gpu.silu_mul(gates(h))))[None]


class _Joined:
    """Linear layers with one input as one product, over a copy of their weights."""

    __slots__ = ("_bias", "_parts", "_weight")

    def __init__(self, parts: Sequence[nn.Linear]) -> None:
        self._parts = parts
        self._weight = torch.cat([part.weight.detach() for part in parts])
        biases = packed.biases_of(parts)
        self._bias = torch.cat(biases).detach() if biases else None

    def addresses(self) -> list[int]:
        """Of the weight, and of the bias if there is one."""
        return [part.data_ptr() for part in (self._weight, self._bias) if part is not None]

    def is_of(self, parts: Sequence[nn.Linear]) -> bool:
        """Whether these are the layers, and their weights of the same type on the same device."""
        kinds = {(part.weight.dtype, part.weight.device) for part in parts}
        return [*map(id, parts)] == [*map(id, self._parts)] and kinds == {(self._weight.dtype, self._weight.device)}

    @torch.no_grad()
    def refresh(self) -> None:
        """Copy the weights."""
        torch.cat([part.weight for part in self._parts], out=self._weight)
        if self._bias is not None:
            torch.cat(packed.biases_of(self._parts), out=self._bias)

    def __call__(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self._weight, self._bias)


def gpu_layers(model: nn.Module, held: dict[nn.Module, GpuLayer]) -> dict[nn.Module, GpuLayer]:
    """The common layers of a model that compute the same here; `held` keeps them with their joined weights."""
    for layer, made in list(held.items()):
        if _common.is_common(layer) and made.is_of(layer):
            made.refresh()
        else:
            del held[layer]
    new = [layer for layer in _common.layers_of(model) if layer not in held and _common.is_common(layer)]
    if new and ROOM * sum(map(_joined_bytes, new)) > _memory.free_on(next(new[0].parameters()).device):
        _slow.tell_no_room(model)
        return held
    for layer in new:
        if (how := _computes_the_same(layer)) is not None:
            held[layer] = GpuLayer(layer, how)
    return held


def _joined_bytes(layer: Any) -> int:
    return sum(part.weight.nbytes for group in _groups(layer) for part in group)


def _groups(layer: Any) -> tuple[list[nn.Linear], list[nn.Linear]]:
    """Linear layers with one input."""
    a, mlp = layer.self_attn, layer.mlp
    return [a.q_proj, a.k_proj, a.v_proj], [mlp.gate_proj, mlp.up_proj]


@torch.inference_mode()
def _computes_the_same(layer: Any) -> How | None:
    """How the layer attends, if its own forward and the kernels agree on some numbers."""
    (x, around), own = _common.probe(layer), _common.Causal()
    tokens, width = x.shape[1], layer.self_attn.head_dim
    out = _common.tried(lambda: _common.plain(layer, x, **around, upturn_plan=own))
    if out is None or own.how is None:
        return None
    shape = (layer.self_attn.layer_idx + 1, 1, layer.self_attn.k_proj.out_features // width, 16, width)
    keys, values = x.new_zeros(shape), x.new_zeros(shape)
    place_T = torch.arange(tokens, device=x.device, dtype=torch.int32)
    single = torch.ones_like(place_T)
    tiles = torch.stack([0 * single, place_T, place_T, single])
    heads = layer.self_attn.q_proj.out_features // width
    plan = KernelPlan(keys, values, 0 * single, place_T, tiles, heads)
    window = How(own.how.scaling, None, own.how.softcap)  # as `Causal` does, whatever the layer's window
    other = _common.tried(lambda: GpuLayer(layer, window)(x, **around, upturn_plan=plan))
    return own.how if other is not None and _common.close(out, other) else None
