"""Attention over the units of a token tree on a CPU, with its gradient.

With AVX2 one kernel does it all (`native/tree.c`), elsewhere kernels between plain matrix products. Nothing is kept for
the backward pass but queries, keys and values: scores are computed again there.

Axes: `T` tokens, `H` query heads, `Hkv` key heads, `D` their width, `B` units of a group, `Q` and `K` their queries and
keys.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from upturn.models.native import back, ops

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


@dataclass(frozen=True)
class Units:
    """All units of a tree, in groups."""

    groups: Sequence[Group]

    @cached_property
    def table(self) -> Tensor:
        """Where the parts of each unit lie, as tree.c takes it: `[U, 7]`, the largest unit first."""
        rows: list[tuple[int, ...]] = []
        start = 0
        for group in self.groups:
            counts = zip((group.queries >= 0).sum(1).tolist(), (group.keys >= 0).sum(1).tolist(), strict=True)
            width = group.keys.shape[1]
            for place, (queries, keys) in enumerate(counts):
                parts = (part[place].data_ptr() for part in (group.queries, group.keys, group.seen))
                rows.append((queries, keys, *parts, width, start + place * width))
            start += group.keys.numel()
        return torch.tensor(sorted(rows, key=lambda row: -row[0] * row[1]))


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


def attend(heads: Heads, units: Units, scaling: float, out: Tensor | None = None) -> Tensor:
    """`[T, H, D]`, into `out` where it is given."""
    q = heads.parts[0]
    out = q.new_empty(q.shape) if out is None else out
    if _has_kernel(heads):
        back.tree_attend(heads.all, heads.kv_heads, units.table, scaling, out)
        return out
    for group in units.groups:
        q_B, k_B, v_B = _gathered(heads, group)
        scores = back.bmm(q_B, k_B.mT)
        back.softmax_(_by_unit(scores, group), group.seen, scaling)
        back.unspread(_by_unit(back.bmm(scores, v_B), group), group.queries, out)
    return out


def attend_back(heads: Heads, g: Tensor, units: Units, copies: Copies, scaling: float) -> Heads:
    """The gradient of queries, keys and values, given that of what they attended to, `g [T, H, D]`."""
    out = Heads(torch.empty_like(heads.all), heads.kv_heads)
    rows = heads.kv_heads * sum(group.keys.numel() for group in units.groups)
    keys, values = heads.all.new_empty(2, rows, g.shape[2])
    if _has_kernel(heads):
        back.tree_attend(heads.all, heads.kv_heads, units.table, scaling, out.all, (g, keys, values))
    else:
        _attend_back(heads, g, units.groups, scaling, (out.parts[0], keys, values))
    for part, found in zip(out.parts[1:], (keys, values), strict=True):
        back.collect(found, copies, part)
    return out


def _attend_back(
    heads: Heads, g: Tensor, groups: Sequence[Group], scaling: float, out: tuple[Tensor, Tensor, Tensor]
) -> None:
    q_out, keys, values = out
    done = 0
    for group in groups:
        q_B, k_B, v_B = _gathered(heads, group)
        g_B = back.spread(g, group.queries).view_as(q_B)
        scores, g_scores = back.bmm(q_B, k_B.mT), back.bmm(g_B, v_B.mT)
        back.softmax_(_by_unit(scores, group), group.seen, scaling, _by_unit(g_scores, group))
        here = slice(done, done + k_B.shape[0] * k_B.shape[1])
        back.bmm(scores.mT, g_B, out=values[here].view_as(v_B))
        back.bmm(g_scores.mT, q_B, out=keys[here].view_as(k_B))
        back.unspread(_by_unit(back.bmm(g_scores, k_B), group), group.queries, q_out)
        done = here.stop


def _has_kernel(heads: Heads) -> bool:
    return back.has_tree_attend(heads.all.dtype) and heads.all.shape[2] % ops.STEP == 0


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
