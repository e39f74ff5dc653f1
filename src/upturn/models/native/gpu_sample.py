"""The choice of the next token on a GPU, in Triton: see `gpu`.

Axes: `N` tokens to choose, `V` vocabulary.
"""

# pyright: reportMissingImports=false, reportIndexIssue=false
from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from upturn.models.native.gpu import jit

LOGITS = 2048
"""Logits that a program takes at once."""


def sample(logits: Tensor, uniform: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Next token of each row of `logits [N, V]` by inversion, and its log-probability at temperature 1, `[N]` each."""
    rows, size = logits.shape
    chosen = torch.empty(rows, dtype=torch.long, device=logits.device)
    logprobs = torch.empty(rows, dtype=torch.float32, device=logits.device)
    per_degree = 1 / temperature if temperature else 1.0
    _sample[(rows,)](
        logits,
        uniform,
        chosen,
        logprobs,
        logits.stride(0),
        size,
        per_degree,
        GREEDY=temperature == 0,
        BLOCK=LOGITS,
        num_warps=8,
    )
    return chosen, logprobs


@jit
def _sample(
    logits, uniform, chosen, logprobs, stride, size, per_degree, GREEDY: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    row, step = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    at = logits + row * stride
    top = float("-inf")
    for left in range(0, size, BLOCK):
        value = tl.load(at + left + step, mask=left + step < size, other=float("-inf")).to(tl.float32)
        top = tl.maximum(top, tl.max(value, 0))
    plain, warm, found = 0.0, 0.0, size
    for left in range(0, size, BLOCK):
        value = tl.load(at + left + step, mask=left + step < size, other=float("-inf")).to(tl.float32) - top
        plain += tl.sum(tl.exp(value), 0)
        if GREEDY:
            found = tl.minimum(found, tl.min(tl.where(value == 0, left + step, size), 0))
        else:
            warm += tl.sum(tl.exp(value * per_degree), 0)
    if not GREEDY:
        # Where the mark falls, block by block; then within that block. The last block that weighs anything, where
        # rounding leaves the mark behind the sum.
        mark, before, base, begin, heavy = tl.load(uniform + row) * warm, 0.0, 0.0, -1, 0
        for left in range(0, size, BLOCK):
            value = tl.load(at + left + step, mask=left + step < size, other=float("-inf")).to(tl.float32) - top
            weight = tl.sum(tl.exp(value * per_degree), 0)
            hit = (begin < 0) & (before + weight > mark)
            begin, base = tl.where(hit, left, begin), tl.where(hit, before, base)
            heavy = tl.where(weight > 0, left, heavy)
            before += weight
        begin, base = tl.where(begin < 0, heavy, begin), tl.where(begin < 0, before, base)
        place = begin + step
        value = tl.load(at + place, mask=place < size, other=float("-inf")).to(tl.float32) - top
        weights = tl.exp(value * per_degree)
        found = tl.min(tl.where((base + tl.cumsum(weights, 0) > mark) & (weights > 0), place, size), 0)
        last = tl.max(tl.where(weights > 0, place, 0), 0)
        found = tl.where(found < size, found, last)
    found = tl.minimum(found, size - 1)  # no logit is the greatest where one is not a number
    tl.store(chosen + row, found.to(tl.int64))
    tl.store(logprobs + row, tl.load(at + found).to(tl.float32) - top - tl.log(plain))
