"""The kernels of kernels.c, attend.c, product.c and layer.c as functions of tensors. Inference only, without gradients.

Axes: `T` tokens, `d` width of the model, `H` heads, `D` width of a head.
"""

from __future__ import annotations

import ctypes
import platform
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor

from upturn.models.native import build

_SIGNATURES = {
    "norm": "iipppfpp",
    "silu_mul": "iipp",
    "rope": "iiiippppf",
    "keep": "iiiippppiipp",
    "attend": "ip" + "iiiip" + "iipp" + "ffip",
    "sample": "iippfpp",
    "has_tiles": "",
    "has_product": "",
    "pack": "iipp",
    "product": "iiipppip",
    "decoder_layer": "pppppppp",
}
PANEL = 32
"""Rows of a weight that are packed together."""
STEP = 32
"""Slots are as long, and heads in them as wide, as a multiple of this."""


_SIZES = ("width", "heads", "kv_heads", "d", "wide", "window")
_WEIGHTS = (
    *("before", "join", "join_bias", "q_norm", "k_norm", "out", "out_bias"),
    *("after", "widen", "widen_bias", "narrow", "narrow_bias"),
)
_NUMBERS = ("before_eps", "after_eps", "q_eps", "k_eps", "scale", "cap")


class Layer(ctypes.Structure):
    """A decoder layer over packed weights, as layer.c takes it; whoever makes it keeps the weights alive."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in _SIZES),
        *((name, ctypes.c_void_p) for name in _WEIGHTS),
        *((name, ctypes.c_float) for name in _NUMBERS),
    ]


class Step(ctypes.Structure):
    """New tokens of some slots, as layer.c takes them; whoever makes it keeps the tensors alive."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("tokens", "runs", "length", "slot_width")),
        *((name, ctypes.c_void_p) for name in ("slot", "place", "run")),
    ]


def usable(like: Tensor) -> bool:
    """Whether there are kernels for tensors of this kind."""
    return like.device.type == "cpu" and _library(like.dtype) is not None


def norm(
    x: Tensor, weight: Tensor, eps: float, more: Tensor | None = None, total: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`x [T, d]`, plus `more` where given (into `total`, where that is given), and its RMS norm times the weight."""
    out = torch.empty_like(x)
    if total is None or more is None:
        total = x if more is None else torch.empty_like(x)
    added = None if more is None else more.data_ptr()
    size, width = x.shape
    args = (x.data_ptr(), added, weight.data_ptr(), eps, total.data_ptr(), out.data_ptr())
    _library(x.dtype).norm(size, width, *args)
    return total, out


def silu_mul(gate_up: Tensor) -> Tensor:
    """`[T, 2 f] -> [T, f]`: SiLU of the first half times the second."""
    size, width = gate_up.shape
    out = gate_up.new_empty(size, width // 2)
    _library(out.dtype).silu_mul(size, width // 2, gate_up.data_ptr(), out.data_ptr())
    return out


def rope_(x: Tensor, cos: Tensor, sin: Tensor, weight: Tensor | None = None, eps: float = 0.0) -> None:
    """The rotary embedding of `x [T, H, D]` in place, `cos, sin [T, D]`; with a weight, RMS norm of each head first."""
    size, heads, width = x.shape
    scale = None if weight is None else weight.data_ptr()
    args = (x.data_ptr(), cos.data_ptr(), sin.data_ptr(), scale, eps)
    _library(x.dtype).rope(size, heads, width, x.stride(0), *args)


def keep(k: Tensor, v: Tensor, slot: Tensor, place: Tensor, keys: Tensor, values: Tensor) -> None:
    """Write `k, v [T, H, D]` into places of slots, `keys, values [slots, H, length, width]` as attend.c lays them."""
    size, heads, width = k.shape
    args = (k.data_ptr(), v.data_ptr(), slot.data_ptr(), place.data_ptr())
    where = (keys.shape[2], keys.shape[3], keys.data_ptr(), values.data_ptr())
    _library(k.dtype).keep(size, heads, width, k.stride(0), *args, *where)


def attend(q: Tensor, runs: Tensor, cache: tuple[Tensor, Tensor], how: tuple[float, float, int], out: Tensor) -> None:
    """Attention of `q [T, H, D]`, each over its slot up to its own place, into `out` like `q`.

    `runs [R, 4]` are the new tokens of each slot: slot, first in `q`, its place, and how many; `cache` as in `keep`.
    `how` is the scale, the soft cap and the window (0: none). Sums are fp32.
    """
    (keys, values), (scale, cap, window) = cache, how
    heads, width = q.shape[1:]
    asked = (heads, keys.shape[1], width, q.stride(0), q.data_ptr())
    where = (keys.shape[2], keys.shape[3], keys.data_ptr(), values.data_ptr())
    _check(_library(q.dtype).attend(len(runs), runs.data_ptr(), *asked, *where, scale, cap, window, out.data_ptr()))


def sample(logits: Tensor, uniform: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Next token of each row of `logits [N, V]` by inversion, and its log-probability at temperature 1, `[N]` each."""
    rows, size = logits.shape
    chosen, logprobs = torch.empty(rows, dtype=torch.long), torch.empty(rows)
    uniform = uniform.float().contiguous()
    args = (logits.data_ptr(), uniform.data_ptr(), temperature, chosen.data_ptr(), logprobs.data_ptr())
    _check(_library(logits.dtype).sample(rows, size, *args))
    return chosen, logprobs


@cache
def has_tiles(dtype: torch.dtype) -> bool:
    """Whether this processor multiplies numbers of this type on matrix tiles."""
    library = _library(dtype)
    return library is not None and bool(library.has_tiles())


@cache
def onednn_has_bf16() -> bool:
    """Whether torch hands products of bfloat16 to oneDNN here."""
    known: Any = torch.ops.mkldnn
    is_asked = torch.backends.mkldnn.is_available() and hasattr(known, "_is_mkldnn_bf16_supported")
    return is_asked and bool(known._is_mkldnn_bf16_supported())


@cache
def torch_has_bf16() -> bool:
    """Whether torch multiplies bfloat16 by instructions of this processor; else it takes two to ten times as long."""
    processor, is_x86 = cast(Any, torch.cpu), platform.machine() in ("x86_64", "AMD64")
    return onednn_has_bf16() and (not is_x86 or processor._is_avx512_bf16_supported())


@cache
def has_product(dtype: torch.dtype) -> bool:
    """Whether `product` takes numbers of this type here: on tiles, or on vectors (AVX2 or AVX-512)."""
    library = _library(dtype)
    return library is not None and bool(library.has_product())


def fits(weight: Tensor) -> bool:
    """Whether a weight `[rows, d]` can be packed for `product`."""
    return weight.device.type == "cpu" and weight.shape[1] % STEP == 0 and has_product(weight.dtype)


def packed(weight: Tensor) -> Tensor:
    """A weight that fits, as `product` takes it."""
    (rows, depth), weight = weight.shape, weight.contiguous()
    panels = weight.new_empty(-(-rows // PANEL) * PANEL, depth)
    _library(weight.dtype).pack(rows, depth, weight.data_ptr(), panels.data_ptr())
    return panels


def product(x: Tensor, panels: Tensor, rows: int, bias: Tensor | None = None, *, gated: bool = False) -> Tensor:
    """`x [T, d]` times the transpose of a packed weight, `[T, rows]`; no row of it depends on the others.

    Gated: of every `PANEL` rows of the weight the first half are the gates of the others, and what comes back is SiLU
    of the ones times the others, `[T, rows / 2]`. ValueError where `x` is not the weight's kind.
    """
    size, depth = x.shape
    if x.dtype != panels.dtype or depth != panels.shape[1]:
        raise ValueError(f"a product of {x.dtype} [{size}, {depth}] with a weight {panels.dtype} of {panels.shape[1]}")
    out = x.new_empty(size, rows // 2 if gated else rows)
    x, added = x.contiguous(), None if bias is None else bias.data_ptr()
    args = (x.data_ptr(), panels.data_ptr(), added, int(gated), out.data_ptr())
    _check(_library(x.dtype).product(size, rows, depth, *args))
    return out


def decoder_layer(
    layer: Layer, step: Step, x: Tensor, turn: tuple[Tensor, Tensor], cache: tuple[Tensor, Tensor]
) -> Tensor:
    """All of a layer, `x [T, d] -> [T, d]`; `turn` is cos and sin `[T, D]`, `cache` as in `keep`."""
    x = x.contiguous()
    out = torch.empty_like(x)
    args = (part.data_ptr() for part in (x, *turn, *cache, out))
    _check(_library(x.dtype).decoder_layer(ctypes.addressof(layer), ctypes.addressof(step), *args))
    return out


def _check(failed: int) -> None:
    if failed:
        raise MemoryError("a kernel found no memory for its scratch space")


@cache
def _library(dtype: torch.dtype) -> Any:
    return build.bound(dtype, _SIGNATURES, ("attend", "sample", "has_tiles", "has_product", "product", "decoder_layer"))
