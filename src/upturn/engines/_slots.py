"""A static KV cache with one slot per running draft, and the attention plan over it."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from upturn.models._attention import How, hidden, sdpa

PADDED = 2
"""Proposals of different lengths are padded to one call while that makes at most so many times their number."""


class Slots:
    """Keys and values of up to `size` contexts of at most `length` tokens.

    Tokens lie from place 0 of their slot without gaps, so a context that begins like the slot's old one reuses it.
    """

    def __init__(self, config: object, size: int, length: int, like: Tensor) -> None:
        self.size, self.length = size, length
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads  # type: ignore[attr-defined]
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads  # type: ignore[attr-defined]
        layers: int = config.num_hidden_layers  # type: ignore[attr-defined]
        shape = (layers, size, heads, length, width)
        self.keys = torch.zeros(shape, dtype=like.dtype, device=like.device)
        self.values = torch.zeros_like(self.keys)


class StepPlan:
    """One forward pass: some slots each get new tokens, which see the slot's earlier tokens and each other.

    rows       slots that take part
    starts     tokens already in each slot
    counts     new tokens of each slot; they lie one slot after the other in the flat step
    asked      of how many of these, the last ones, the next token is wanted: one and the proposals

    Slots that decode bring one token and their proposals, slots that begin bring their context. The last tokens of
    every slot form one attention call over the cache as it lies; the earlier ones form a second one.
    """

    def __init__(
        self,
        slots: Slots,
        rows: Sequence[int],
        starts: Sequence[int],
        counts: Sequence[int],
        asked: Sequence[int],
    ) -> None:
        self.slots = slots
        device = slots.keys.device
        spans = list(zip(rows, starts, counts, accumulate(counts), strict=True))
        self.row_T = torch.tensor([row for row, _, count, _ in spans for _ in range(count)], device=device)
        self.place_T = torch.tensor([start + i for _, start, count, _ in spans for i in range(count)], device=device)
        wanted = [place for end, n in zip(accumulate(counts), asked, strict=True) for place in range(end - n, end)]
        self.asked_N = torch.tensor(wanted, device=device)
        tail = max(asked) if len(asked) * max(asked) <= PADDED * sum(asked) else 1
        last = [(row, end - min(n, tail), start + n - min(n, tail), min(n, tail)) for row, start, n, end in spans]
        rest = [(row, end - n, start, n - tail) for row, start, n, end in spans if n > tail]
        self._parts = [_Part(part, slots.length, device) for part in (last, rest) if part]

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, how: How) -> Tensor:
        """See `Plan`: store the new keys and values, then attend over each slot."""
        keys, values = self.slots.keys[layer], self.slots.values[layer]
        keys[self.row_T, :, self.place_T] = k[0].transpose(0, 1)
        values[self.row_T, :, self.place_T] = v[0].transpose(0, 1)
        q_T = q[0].transpose(0, 1)  # [T, H, D]
        out_T = torch.empty_like(q_T)
        for part in self._parts:
            k_B, v_B = keys[part.rows, :, : part.top], values[part.rows, :, : part.top]
            out = sdpa(q_T[part.flat].transpose(1, 2), k_B, v_B, part.mask(how.window), how)
            out_T[part.flat[part.real]] = out.transpose(1, 2)[part.real]
        return out_T[None]


class _Part:
    """Queries of some slots in one padded call: each is (slot, first flat place, first place in the slot, count)."""

    def __init__(self, queries: Sequence[tuple[int, int, int, int]], length: int, device: torch.device) -> None:
        rows = [row for row, _, _, _ in queries]
        whole = rows == list(range(len(rows)))
        self.rows: slice | Tensor = slice(0, len(rows)) if whole else torch.tensor(rows, device=device)
        flat, depth, count = (torch.tensor([query[i] for query in queries], device=device)[:, None] for i in (1, 2, 3))
        span = torch.arange(max(query[3] for query in queries), device=device)
        self.real = span < count
        self.flat = torch.where(self.real, flat + span, 0)
        self._depth = torch.where(self.real, depth + span, 0)
        # Slots that take part as they lie are read in their whole length: a cut would not be contiguous, and slow.
        self.top = length if whole else max(at + count for _, _, at, count in queries)
        self._masks: dict[int | None, Tensor] = {}

    def mask(self, window: int | None) -> Tensor:
        """`[B, 1, Q, K]`: each query sees the keys up to its own place."""
        if window not in self._masks:
            key = torch.arange(self.top, device=self._depth.device)
            seen = key <= self._depth[:, :, None]
            if window is not None:
                seen &= self._depth[:, :, None] - key < window
            self._masks[window] = hidden(seen[:, None])
        return self._masks[window]
