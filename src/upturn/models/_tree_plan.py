"""Attention over a token tree: one path for the CPU, one for CUDA, the same results.

CPU    trees of similar size are gathered into one padded batch with a dense ancestor mask: trees are short, so
       one call per batch beats one call per node, and every linear layer still runs on the flat tokens.
CUDA   FlexAttention with a block mask over the flat tokens (it has no backward pass on CPU).
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from upturn.models._attention import How, sdpa
from upturn.trees import TokenTree

PADDING_ALLOWED = 1.25
"""A group of trees is closed when its padded size exceeds its real size by this factor."""


class TreePlan:
    """Attention plan of one batch; masks are made once and shared by all layers."""

    def __init__(self, tree: TokenTree, *, flex: bool | None = None) -> None:
        self.tree = tree
        self.flex = tree.ids_T.is_cuda if flex is None else flex
        self._masks: dict[int | None, Any] = {}

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, how: How) -> Tensor:
        """See `Plan`."""
        if how.window not in self._masks:
            make = self._block_mask if self.flex else self._dense_masks
            self._masks[how.window] = make(how.window)
        masks = self._masks[how.window]
        return self._flex(q, k, v, masks, how) if self.flex else self._grouped(q, k, v, masks, how)

    @cached_property
    def _groups(self) -> list[Tensor]:
        """Flat places `[B, L]` of trees of similar length, -1 where padded."""
        roots = sorted(self.tree.roots, key=lambda root: root[1])
        groups: list[list[tuple[int, int]]] = []
        for root in roots:
            if groups:
                real = sum(length for _, length in groups[-1]) + root[1]
                if (len(groups[-1]) + 1) * root[1] <= PADDING_ALLOWED * real:
                    groups[-1].append(root)
                    continue
            groups.append([root])
        device = self.tree.ids_T.device
        places = []
        for group in groups:
            width = max(length for _, length in group)
            span = torch.arange(width, device=device)
            starts = torch.tensor([start for start, _ in group], device=device)
            lengths = torch.tensor([length for _, length in group], device=device)
            places.append(
                torch.where(span[None] < lengths[:, None], starts[:, None] + span[None], -1)
            )
        return places

    def _dense_masks(self, window: int | None) -> list[Tensor]:
        masks = []
        for places in self._groups:
            real = places >= 0
            ends = self.tree.ends_T[places.clamp(min=0)]
            depth = self.tree.positions_T[places.clamp(min=0)]
            q, k = places[:, :, None], places[:, None, :]
            mask = (k <= q) & (q < ends[:, None, :]) & real[:, None, :] & real[:, :, None]
            if window is not None:
                mask &= depth[:, :, None] - depth[:, None, :] < window
            width = places.shape[1]
            itself = torch.eye(width, dtype=torch.bool, device=mask.device)
            masks.append((mask | itself)[:, None])  # padding sees itself: no empty row, no NaN
        return masks

    def _grouped(self, q: Tensor, k: Tensor, v: Tensor, masks: list[Tensor], how: How) -> Tensor:
        q_T, k_T, v_T = (x.squeeze(0).transpose(0, 1) for x in (q, k, v))  # [T, H, D]
        parts = []
        for places, mask in zip(self._groups, masks, strict=True):
            picked = places.clamp(min=0)
            padded = (x[picked].transpose(1, 2) for x in (q_T, k_T, v_T))  # [B, H, L, D]
            out = sdpa(*padded, mask, how).transpose(1, 2)
            parts.append(out[places >= 0])
        order = torch.cat([places[places >= 0] for places in self._groups])
        flat = torch.cat(parts)
        return flat.new_empty(flat.shape).index_copy(0, order, flat)[None]

    def _block_mask(self, window: int | None) -> Any:
        from torch.nn.attention.flex_attention import create_block_mask

        ends_T, depth_T = self.tree.ends_T, self.tree.positions_T

        def visible(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            seen = (k <= q) & (q < ends_T[k])
            return seen if window is None else seen & (depth_T[q] - depth_T[k] < window)

        size = len(self.tree.ids_T)
        return create_block_mask(visible, None, None, size, size, device=str(self.tree.ids_T.device))

    def _flex(self, q: Tensor, k: Tensor, v: Tensor, mask: Any, how: How) -> Tensor:
        from torch.nn.attention import flex_attention as flex

        run = _compiled_flex() if q.is_cuda else flex.flex_attention
        cap = how.softcap
        score = None if not cap else lambda s, b, h, i, j: cap * torch.tanh(s / cap)
        grouped = q.shape[1] != k.shape[1]
        out = run(q, k, v, score_mod=score, block_mask=mask, scale=how.scaling, enable_gqa=grouped)
        return out.transpose(1, 2)


_FLEX: list[Any] = []


def _compiled_flex() -> Any:
    if not _FLEX:
        from torch.nn.attention.flex_attention import flex_attention

        _FLEX.append(torch.compile(flex_attention, dynamic=True))
    return _FLEX[0]
