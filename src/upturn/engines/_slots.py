"""A static KV cache with one slot per running draft, and the attention plan over it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from upturn.models._attention import How, sdpa


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
    """

    def __init__(self, slots: Slots, rows: Sequence[int], starts: Sequence[int], counts: Sequence[int]) -> None:
        self.slots, self.counts = slots, list(counts)
        device = slots.keys.device
        self.row_T = torch.tensor([r for r, n in zip(rows, counts, strict=True) for _ in range(n)], device=device)
        self.place_T = torch.tensor(
            [s + i for s, n in zip(starts, counts, strict=True) for i in range(n)], device=device
        )
        self.top = max(s + n for s, n in zip(starts, counts, strict=True))
        self.contiguous = list(rows) == list(range(len(rows)))
        self.rows = torch.tensor(list(rows), device=device)
        width = max(counts)
        span = torch.arange(width, device=device)
        count_B = torch.tensor(self.counts, device=device)
        start_B = torch.tensor(list(starts), device=device)
        self.real = span[None] < count_B[:, None]  # [B, Q]
        places = torch.where(self.real, start_B[:, None] + span[None], 0)
        self.gather = torch.where(self.real, count_B.cumsum(0)[:, None] - count_B[:, None] + span[None], 0)
        self._keys_at = torch.arange(self.top, device=device)
        self._depth = places
        self._masks: dict[int | None, Tensor] = {}

    def _mask(self, window: int | None) -> Tensor:
        if window not in self._masks:
            seen = self._keys_at[None, None] <= self._depth[:, :, None]
            if window is not None:
                seen &= self._depth[:, :, None] - self._keys_at[None, None] < window
            self._masks[window] = seen[:, None]
        return self._masks[window]

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, how: How) -> Tensor:
        """See `Plan`: store the new keys and values, then attend over each slot."""
        keys, values = self.slots.keys[layer], self.slots.values[layer]
        keys[self.row_T, :, self.place_T] = k[0].transpose(0, 1)
        values[self.row_T, :, self.place_T] = v[0].transpose(0, 1)
        if self.contiguous:
            k_B, v_B = keys[: len(self.counts), :, : self.top], values[: len(self.counts), :, : self.top]
        else:
            k_B, v_B = keys[self.rows, :, : self.top], values[self.rows, :, : self.top]
        q_T = q[0].transpose(0, 1)  # [T, H, D]
        if self.real.shape[1] == 1:
            out = sdpa(q_T[:, :, None], k_B, v_B, self._mask(how.window), how)
            return out[:, :, 0][None]
        out = sdpa(q_T[self.gather].transpose(1, 2), k_B, v_B, self._mask(how.window), how)
        return out.transpose(1, 2)[self.real][None]
