"""Attention over a token tree: one path for the CPU, one for CUDA, the same results.

CPU    the tree is cut into units: small subtrees, and pieces of the nodes above them. A unit's queries see its
       ancestors and its own tokens. Units of similar size are gathered into one padded batch with a dense ancestor
       mask; every linear layer still runs on the flat tokens. Layers of the common kind do this with kernels and
       gradients of their own (`_tree_attention`).
CUDA   FlexAttention with a block mask over the flat tokens (`_flex`; it has no backward pass on CPU).
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from upturn.models import _flex
from upturn.models._attention import How, hidden, sdpa
from upturn.models._tree_attention import Copies, Group, Units, copies
from upturn.trees import Span, TokenTree

UNIT_TOKENS = 192
"""Subtrees up to this size are one unit; larger ones are cut: pieces of their node, and their children's subtrees."""
PADDING_ALLOWED = 1.4
"""A group of units is closed when its padded area exceeds its real area by this factor."""


class TreePlan:
    """Attention plan of one batch; masks are made once and shared by all layers."""

    def __init__(self, tree: TokenTree, *, flex: bool | None = None) -> None:
        self.tree = tree
        self.flex = tree.ids_T.is_cuda if flex is None else flex
        self._masks: dict[int | None, list[Tensor]] = {}
        self._blocks: dict[int | None, Any] = {}
        self._units: dict[int | None, Units] = {}
        self._copies: dict[int, Copies] = {}

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, how: How) -> Tensor:
        """See `Plan`."""
        if self.flex:
            window = None if how.window is None or how.window >= self._deepest else how.window  # one that hides some
            if window not in self._blocks:
                self._blocks[window] = _flex.block_mask(self.tree, window)
            if (out := _flex.attend(q, k, v, self._blocks[window], how)) is not None:
                return out
        if how.window not in self._masks:
            self._masks[how.window] = [hidden(seen[:, None]) for seen in self._visible(how.window)]
        return self._grouped(q, k, v, self._masks[how.window], how)

    @cached_property
    def _deepest(self) -> int:
        """Tokens of the longest path."""
        depths: list[int] = []
        for span in self.tree.spans:
            depths.append(span.length + (depths[span.parent] if span.parent >= 0 else 0))
        return max(depths, default=0)

    @cached_property
    def _groups(self) -> list[tuple[Tensor, Tensor]]:
        """Flat places of queries `[B, Q]` and keys `[B, K]` of units of similar size, -1 where padded."""
        units = sorted(_units(self.tree.spans), key=lambda unit: (len(unit[1]), len(unit[0])))
        groups: list[list[tuple[list[int], list[int]]]] = []
        real = 0
        for unit in units:
            area = len(unit[0]) * len(unit[1])
            if groups:
                widest = max(len(queries) for queries, _ in [*groups[-1], unit])
                if (len(groups[-1]) + 1) * widest * len(unit[1]) <= PADDING_ALLOWED * (real + area):
                    groups[-1].append(unit)
                    real += area
                    continue
            groups.append([unit])
            real = area
        device = self.tree.ids_T.device
        return [(_padded([q for q, _ in g], device), _padded([k for _, k in g], device)) for g in groups]

    def units(self, window: int | None) -> Units:
        """The units of the CPU path with what each query sees."""
        if window not in self._units:
            seen = self._visible(window)
            self._units[window] = Units([Group(q, k, s) for (q, k), s in zip(self._groups, seen, strict=True)])
        return self._units[window]

    def copies(self, kv_heads: int) -> Copies:
        """Where the copies of each token's key lie, all groups end to end."""
        if kv_heads not in self._copies:
            self._copies[kv_heads] = copies([keys for _, keys in self._groups], len(self.tree.ids_T), kv_heads)
        return self._copies[kv_heads]

    def _visible(self, window: int | None) -> list[Tensor]:
        ends_T, depth_T = self.tree.ends_T, self.tree.positions_T
        masks = []
        for queries, keys in self._groups:
            q, k = queries.clamp(min=0)[:, :, None], keys.clamp(min=0)[:, None, :]
            mask = (k <= q) & (q < ends_T[k]) & (keys >= 0)[:, None, :]
            if window is not None:
                mask &= depth_T[q] - depth_T[k] < window
            mask[:, :, 0] |= (queries < 0) | ~mask.any(-1)  # no empty row, so no NaN; padded rows are dropped
            masks.append(mask)
        return masks

    def _grouped(self, q: Tensor, k: Tensor, v: Tensor, masks: list[Tensor], how: How) -> Tensor:
        q_T, k_T, v_T = (x.squeeze(0).transpose(0, 1) for x in (q, k, v))  # [T, H, D]
        parts = []
        for (queries, keys), mask in zip(self._groups, masks, strict=True):
            q_B = q_T[queries.clamp(min=0)].transpose(1, 2)  # [B, H, Q, D]
            k_B, v_B = (x[keys.clamp(min=0)].transpose(1, 2) for x in (k_T, v_T))
            parts.append(sdpa(q_B, k_B, v_B, mask, how).transpose(1, 2)[queries >= 0])
        order = torch.cat([queries[queries >= 0] for queries, _ in self._groups])
        flat = torch.cat(parts)
        return flat.new_empty(flat.shape).index_copy(0, order, flat)[None]


def _units(spans: tuple[Span, ...]) -> list[tuple[list[int], list[int]]]:
    """Flat places of the queries and keys of each unit; every token is a query once."""
    above: list[list[int]] = []  # flat places of the ancestors of each node
    whole: set[int] = set()  # nodes that stand inside a unit
    units = []
    for place, span in enumerate(spans):
        parent = spans[span.parent] if span.parent >= 0 else None
        path = [] if parent is None else [*above[span.parent], *range(parent.start, parent.start + parent.length)]
        above.append(path)
        if span.parent in whole:
            whole.add(place)
            continue
        small = span.stop - span.start <= UNIT_TOKENS
        if small:
            whole.add(place)
        stop = span.stop if small else span.start + span.length
        step = max(1, stop - span.start) if small else UNIT_TOKENS
        for first in range(span.start, stop, step):  # a piece does not see the node's later ones
            last = min(first + step, stop)
            units.append((list(range(first, last)), path + list(range(span.start, last))))
    return units


def _padded(rows: list[list[int]], device: torch.device) -> Tensor:
    width = max(len(row) for row in rows)
    return torch.tensor([row + [-1] * (width - len(row)) for row in rows], device=device)
