"""Attention over the units of a token tree on a CPU, with its gradient: kernels between plain matrix products.

Nothing is kept for the backward pass but queries, keys and values: scores are computed again there.

Axes: `T` tokens, `H` query heads, `Hkv` key heads, `D` their width, `B` units of a group, `Q` and `K` their queries and
keys.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from upturn.models.native import back

Copies = tuple[Tensor, Tensor, Tensor]
"""Where the copies of each token begin in a list `[T + 1]`; their rows for head 0, and the rows between heads."""


@dataclass(frozen=True, slots=True)
class Group:
    """Units of similar size, padded."""

    queries: Tensor
    """Flat places of the queries `[B, Q]`, -1 where padded."""
    keys: Tensor
    """Flat places of the keys `[B, K]`, -1 where padded."""
    seen: Tensor
    """Which keys a query sees `[B, Q, K]`; every query sees one."""


@dataclass(frozen=True, slots=True)
class Heads:
    """Queries, keys and values of all tokens side by side, `[T, H + 2 Hkv, D]`, or their gradients."""

    all: Tensor
    kv_heads: int

    @property
    def parts(self) -> tuple[Tensor, Tensor, Tensor]:
        """`q [T, H, D]`, `k, v [T, Hkv, D]`: views."""
        kv = self.kv_heads
        q, k, v = self.all.split((self.all.shape[1] - 2 * kv, kv, kv), 1)
        return q, k, v


def attend(heads: Heads, groups: Sequence[Group], scaling: float) -> Tensor:
    """`[T, H, D]`."""
    q = heads.parts[0]
    out = q.new_empty(q.shape)
    for group in groups:
        q_B, k_B, v_B = _gathered(heads, group)
        scores = torch.bmm(q_B, k_B.mT)
        back.softmax_(_by_unit(scores, group), group.seen, scaling)
        back.unspread(_by_unit(torch.bmm(scores, v_B), group), group.queries, out)
    return out


def attend_back(heads: Heads, g: Tensor, groups: Sequence[Group], copies: Copies, scaling: float) -> Heads:
    """The gradient of queries, keys and values, given that of what they attended to, `g [T, H, D]`."""
    out = Heads(torch.empty_like(heads.all), heads.kv_heads)
    q_out, k_out, v_out = out.parts
    rows = heads.kv_heads * sum(group.keys.numel() for group in groups)
    keys, values = heads.all.new_empty(2, rows, g.shape[2])
    done = 0
    for group in groups:
        q_B, k_B, v_B = _gathered(heads, group)
        g_B = back.spread(g, group.queries).view_as(q_B)
        scores, g_scores = torch.bmm(q_B, k_B.mT), torch.bmm(g_B, v_B.mT)
        back.softmax_(_by_unit(scores, group), group.seen, scaling, _by_unit(g_scores, group))
        here = slice(done, done + k_B.shape[0] * k_B.shape[1])
        torch.bmm(scores.mT, g_B, out=values[here].view_as(v_B))
        torch.bmm(g_scores.mT, q_B, out=keys[here].view_as(k_B))
        back.unspread(_by_unit(torch.bmm(g_scores, k_B), group), group.queries, q_out)
        done = here.stop
    back.collect(keys, copies, k_out)
    back.collect(values, copies, v_out)
    return out


def copies(keys: Sequence[Tensor], num_tokens: int, kv_heads: int) -> Copies:
    """Where the copies that `attend_back` makes of each key lie; `keys` are those of each group."""
    places = torch.cat([part.reshape(-1) for part in keys])
    steps = torch.cat([torch.full((part.numel(),), part.shape[1]) for part in keys])
    within = torch.cat([torch.arange(part.shape[1]).repeat(part.shape[0]) for part in keys])
    rows = (torch.arange(len(places)) - within) * kv_heads + within
    order = places.argsort(stable=True)[(places < 0).sum() :]
    first = torch.zeros(num_tokens + 1, dtype=torch.int64)
    first[1:] = torch.bincount(places[order], minlength=num_tokens).cumsum(0)
    return first, rows[order].contiguous(), steps[order].contiguous()


def _gathered(heads: Heads, group: Group) -> tuple[Tensor, Tensor, Tensor]:
    """`[B Hkv, H / Hkv Q, D]` and twice `[B Hkv, K, D]`: the query heads of one key head lie along the query axis."""
    q, k, v = heads.parts
    k_B, v_B = (back.spread(x, group.keys).flatten(0, 1) for x in (k, v))
    return back.spread(q, group.queries).view(len(k_B), -1, q.shape[2]), k_B, v_B


def _by_unit(x: Tensor, group: Group) -> Tensor:
    """`[B Hkv, H / Hkv Q, .] -> [B, H, Q, .]`."""
    units, queries = group.queries.shape
    return x.view(units, -1, queries, x.shape[2])
