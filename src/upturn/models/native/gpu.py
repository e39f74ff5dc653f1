"""The kernels of generation on a GPU, in Triton: a decoder layer's small operations, and attention over slots.

The counterpart of `ops` on a CPU, with `gpu_sample`. Inference only. Sums are fp32, and no row of a result depends on
its neighbours. Axes: `T` tokens of a step, `d` width of the model, `H` heads, `D` width of a head, `f` of the gate.

Import it only where `on_gpu` of the package says so: a build of torch for CPUs comes without Triton.
"""

# pyright: reportMissingImports=false, reportIndexIssue=false
from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

jit: Any = triton.jit
"""Triton's own types are those of numbers in a program; it is launched with numbers of ours. So with the next two."""
cdiv: Any = triton.cdiv
next_power_of_2: Any = triton.next_power_of_2
KEYS, LEAST_KEYS = 64, 16
"""Keys that a program of `attend` takes at once, and the fewest that a matrix product takes."""
KEYS_BYTES = 16 * 2**10
"""What these keys may take, or there is no room for them, for their values and for the next ones on most GPUs."""
ROWS = 16
"""Rows of the smallest matrix product of a GPU: heads that share a key, times tokens."""
INNER = 1024
"""Numbers of a gate that a program takes."""


def norm(x: Tensor, weight: Tensor, eps: float, more: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """`x [T, d]`, plus `more` where given, and its RMS norm times the weight."""
    out, width = torch.empty_like(x), x.shape[1]
    total = x if more is None else torch.empty_like(x)
    block = next_power_of_2(width)
    _norm[(len(x),)](x, x if more is None else more, weight, total, out, width, eps, ADD=more is not None, BLOCK=block)
    return total, out


def silu_mul(gate_up: Tensor) -> Tensor:
    """`[T, 2 f] -> [T, f]`: SiLU of the first half times the second."""
    size, width = len(gate_up), gate_up.shape[1] // 2
    out = gate_up.new_empty(size, width)
    _silu_mul[(size, cdiv(width, INNER))](gate_up, out, width, BLOCK=INNER)
    return out


@dataclass(frozen=True, slots=True)
class Turn:
    """How the heads of a layer are normed and turned before they attend."""

    cos: Tensor
    """`[T, D]`, as `sin`."""
    sin: Tensor
    q_norm: Tensor | None
    k_norm: Tensor | None
    eps: tuple[float, float]
    """Of both norms."""


def turn_and_keep(
    joined: Tensor, turn: Turn, where: tuple[Tensor, Tensor], cache: tuple[Tensor, Tensor], heads: int
) -> None:
    """Norm and rotate queries and keys of `joined [T, (H + 2 Hkv) * D]`; queries stay, the others go to the cache.

    where   slot and place of each token, `[T]` int32
    cache   keys and values, `[slots, Hkv, length, D]`
    """
    (slot, place), (keys, values) = where, cache
    kv_heads, length, width = keys.shape[1:]
    plain = turn.cos
    norms = [plain if scale is None else scale for scale in (turn.q_norm, turn.k_norm)]
    _turn_and_keep[(len(joined), heads + 2 * kv_heads)](
        joined,
        turn.cos,
        turn.sin,
        *norms,
        *turn.eps,
        slot,
        place,
        keys,
        values,
        heads,
        kv_heads,
        length,
        width,
        HAS_Q_NORM=turn.q_norm is not None,
        HAS_K_NORM=turn.k_norm is not None,
        HALF=next_power_of_2(width // 2),
    )


def tile_tokens(heads: int, kv_heads: int) -> int:
    """Tokens of one slot that a program of `attend` takes at once."""
    return max(4, ROWS // next_power_of_2(heads // kv_heads))


def keys_at_once(width: int, bytes_each: int) -> int:
    """Keys of a width, of numbers of so many bytes, that a program takes at once."""
    count = KEYS
    while count > LEAST_KEYS and count * width * bytes_each > KEYS_BYTES:
        count //= 2
    return count


def attend(q: Tensor, tiles: Tensor, cache: tuple[Tensor, Tensor], how: tuple[float, float, int], out: Tensor) -> None:
    """Attention of `q [T, H, D]`, each over its slot up to its own place, into `out [T, H, D]`.

    tiles   `[4, N]` int32: slot, first token of the step, its place in the slot, and how many tokens (at most
            `tile_tokens`, side by side in both); 0 tokens: nothing to do
    cache   as in `turn_and_keep`; the keys and values of the tokens are there already
    how     scale, soft cap and window (0: none)
    """
    (keys, values), (scale, cap, window) = cache, how
    kv_heads, length, width = keys.shape[1:]
    groups, tokens = q.shape[1] // kv_heads, tile_tokens(q.shape[1], kv_heads)
    assert q.stride(2) == 1 and q.stride(1) == width and out.is_contiguous()
    wide = max(16, next_power_of_2(width))
    _attend[(tiles.shape[1], kv_heads)](
        q,
        keys,
        values,
        out,
        tiles,
        tiles.shape[1],
        scale,
        cap,
        window,
        q.stride(0),
        out.stride(0),
        length,
        kv_heads,
        groups,
        width,
        GROUPS=next_power_of_2(groups),
        TOKENS=tokens,
        WIDTH=wide,
        BLOCK=keys_at_once(wide, q.element_size()),
        HAS_CAP=cap > 0,
        PRECISION="ieee",
    )


@jit
def _norm(x, more, weight, total, out, width, eps, ADD: tl.constexpr, BLOCK: tl.constexpr):
    row, place = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    seen = place < width
    value = tl.load(x + row * width + place, mask=seen, other=0.0)
    if ADD:
        added = tl.load(more + row * width + place, mask=seen, other=0.0)
        value = (value.to(tl.float32) + added.to(tl.float32)).to(value.dtype)
        tl.store(total + row * width + place, value, mask=seen)
    wide = value.to(tl.float32)
    scale = tl.math.rsqrt(tl.sum(wide * wide, 0) / width + eps)
    normed = (wide * scale).to(value.dtype).to(tl.float32)
    known = tl.load(weight + place, mask=seen, other=0.0).to(tl.float32)
    tl.store(out + row * width + place, (normed * known).to(value.dtype), mask=seen)


@jit
def _silu_mul(gate_up, out, width, BLOCK: tl.constexpr):
    row, place = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    seen = place < width
    gate = tl.load(gate_up + row * 2 * width + place, mask=seen, other=0.0)
    up = tl.load(gate_up + row * 2 * width + width + place, mask=seen, other=0.0).to(tl.float32)
    wide = gate.to(tl.float32)
    silu = (wide / (1 + tl.exp(-wide))).to(gate.dtype).to(tl.float32)
    tl.store(out + row * width + place, (silu * up).to(gate.dtype), mask=seen)


@jit
def _turn_and_keep(
    joined, cos, sin, q_norm, k_norm, q_eps, k_eps, slot, place, keys, values,
    heads, kv_heads, length, width,
    HAS_Q_NORM: tl.constexpr, HAS_K_NORM: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    half, lane = width // 2, tl.arange(0, HALF)
    seen = lane < half
    at = joined + (token * (heads + 2 * kv_heads) + head) * width + lane
    one, other = tl.load(at, mask=seen, other=0.0), tl.load(at + half, mask=seen, other=0.0)
    into = ((tl.load(slot + token).to(tl.int64) * kv_heads) * length + tl.load(place + token)) * width + lane
    if head >= heads + kv_heads:
        into += (head - heads - kv_heads) * length * width
        tl.store(values + into, one, mask=seen)
        tl.store(values + into + half, other, mask=seen)
    else:
        low, high = one.to(tl.float32), other.to(tl.float32)
        is_key = head >= heads
        if HAS_Q_NORM:
            if not is_key:
                scale = tl.math.rsqrt((tl.sum(low * low, 0) + tl.sum(high * high, 0)) / width + q_eps)
                low = low * scale * tl.load(q_norm + lane, mask=seen, other=0.0).to(tl.float32)
                high = high * scale * tl.load(q_norm + half + lane, mask=seen, other=0.0).to(tl.float32)
        if HAS_K_NORM:
            if is_key:
                scale = tl.math.rsqrt((tl.sum(low * low, 0) + tl.sum(high * high, 0)) / width + k_eps)
                low = low * scale * tl.load(k_norm + lane, mask=seen, other=0.0).to(tl.float32)
                high = high * scale * tl.load(k_norm + half + lane, mask=seen, other=0.0).to(tl.float32)
        turned = token * width + lane
        low_cos = tl.load(cos + turned, mask=seen, other=0.0).to(tl.float32)
        high_cos = tl.load(cos + turned + half, mask=seen, other=0.0).to(tl.float32)
        low_sin = tl.load(sin + turned, mask=seen, other=0.0).to(tl.float32)
        high_sin = tl.load(sin + turned + half, mask=seen, other=0.0).to(tl.float32)
        low, high = low * low_cos - high * low_sin, high * high_cos + low * high_sin
        if is_key:
            into += (head - heads) * length * width
            tl.store(keys + into, low.to(one.dtype), mask=seen)
            tl.store(keys + into + half, high.to(one.dtype), mask=seen)
        else:
            tl.store(at, low.to(one.dtype), mask=seen)
            tl.store(at + half, high.to(one.dtype), mask=seen)


@jit
def _attend(
    q, keys, values, out, tiles, num_tiles, scale, cap, window, q_stride, out_stride,
    length, kv_heads, groups, width,
    GROUPS: tl.constexpr, TOKENS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
    HAS_CAP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    tile, head = tl.program_id(0), tl.program_id(1)
    count = tl.load(tiles + 3 * num_tiles + tile)
    if count > 0:
        slot = tl.load(tiles + tile).to(tl.int64)
        first = tl.load(tiles + num_tiles + tile).to(tl.int64)
        place = tl.load(tiles + 2 * num_tiles + tile)
        row, lane, step = tl.arange(0, TOKENS * GROUPS), tl.arange(0, WIDTH), tl.arange(0, BLOCK)
        token, member = row // GROUPS, row % GROUPS
        real = ((token < count) & (member < groups))[:, None] & (lane < width)[None, :]
        which = (head * groups + member)[:, None] * width + lane[None, :]
        query = tl.load(q + (first + token)[:, None] * q_stride + which, mask=real, other=0.0)
        begin = (slot * kv_heads + head) * length * width
        top = tl.full([TOKENS * GROUPS], float("-inf"), tl.float32)
        total = tl.zeros([TOKENS * GROUPS], tl.float32)
        sums = tl.zeros([TOKENS * GROUPS, WIDTH], tl.float32)
        own, last = (place + token)[:, None], place + count
        start = 0
        if window > 0:
            start = tl.maximum(place - window + 1, 0) // BLOCK * BLOCK
        for left in range(start, last, BLOCK):
            key = left + step
            there = (key < last)[:, None] & (lane < width)[None, :]
            at = begin + key[:, None] * width + lane[None, :]
            held = tl.load(keys + at, mask=there, other=0.0)
            scores = tl.dot(query, tl.trans(held), input_precision=PRECISION) * scale
            if HAS_CAP:
                scores = cap * (2 / (1 + tl.exp(-2 * scores / cap)) - 1)
            seen = (key[None, :] <= own) & ((window <= 0) | (own - key[None, :] < window))
            scores = tl.where(seen, scores, float("-inf"))
            higher = tl.maximum(top, tl.max(scores, 1))
            safe = tl.where(higher == float("-inf"), 0.0, higher)
            weights = tl.exp(scores - safe[:, None])
            kept = tl.exp(top - safe)
            total = total * kept + tl.sum(weights, 1)
            held = tl.load(values + at, mask=there, other=0.0)
            sums = sums * kept[:, None] + tl.dot(weights.to(held.dtype), held, input_precision=PRECISION)
            top = higher
        sums = sums / tl.where(total == 0.0, 1.0, total)[:, None]
        tl.store(out + (first + token)[:, None] * out_stride + which, sums.to(query.dtype), mask=real)
