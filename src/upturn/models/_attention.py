"""One attention function, registered with `transformers`, that follows a plan instead of a mask.

The plan travels through the model's forward as a keyword argument; the model's own code is untouched, so every
architecture that uses the attention interface of `transformers` works: Llama, Qwen2, Qwen3, Gemma and more.
"""

from __future__ import annotations

from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

NAME = "upturn"
PLAIN_KEYS = 384
"""Up to so many keys two plain matrix products beat the fused kernel on a CPU (1.6 times at 100 keys)."""

STRANGE = ("s_aux", "sinks", "position_bias", "indices", "block_indices")
"""What some models hand to their attention besides queries, keys and values, that would move the result."""


class Plan(Protocol):
    """Knows which keys each query may see. One that can do all of a layer has `takes` and `run` too (`StepPlan`)."""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, how: How) -> Tensor:
        """`q [1, H, T, D]`, `k, v [1, Hkv, T, D]` of this step's tokens -> `[1, T, H, D]`."""
        ...


class How:
    """Scale, sliding window and soft cap of one layer's attention."""

    __slots__ = ("scaling", "softcap", "window")

    def __init__(self, scaling: float, window: int | None, softcap: float | None) -> None:
        self.scaling, self.window, self.softcap = scaling, window, softcap


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    upturn_plan: Plan | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention interface of `transformers`, handed on to the plan."""
    assert upturn_plan is not None, "a model with attn_implementation='upturn' needs a plan"
    if strange := [name for name in STRANGE if kwargs.get(name) is not None]:
        raise ValueError(f"it attends by {', '.join(strange)} too, of which a plan knows nothing")
    scaling = kwargs.get("scaling") or query.shape[-1] ** -0.5
    how = How(scaling, kwargs.get("sliding_window"), kwargs.get("softcap"))
    return upturn_plan.attend(int(module.layer_idx), query, key, value, how), None  # type: ignore[arg-type]


def heads_of(config: Any) -> tuple[int, int]:
    """How many heads of keys a model has, and how wide they are."""
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    return heads, getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, how: How, *, few_queries: int = 0) -> Tensor:
    """Grouped-query attention. `q [B, H, Q, D]`, `k, v [B, Hkv, K, D]`, `mask [B, 1, Q, K]` as `hidden` makes it.

    The query heads of one key head are laid along the query axis, so keys are never repeated. Up to `PLAIN_KEYS` keys
    or `few_queries` queries are done by plain products, more by the fused kernel.
    """
    batch, heads, queries, width = q.shape
    groups = heads // k.shape[1]
    folded = q.reshape(batch, k.shape[1], groups * queries, width)
    if how.softcap or k.shape[2] <= PLAIN_KEYS or queries <= few_queries:
        scores = (folded @ k.transpose(-1, -2)).view(batch, k.shape[1], groups, queries, -1)
        if how.softcap:
            capped = how.softcap * torch.tanh(scores.float() * (how.scaling / how.softcap))
            scores = capped + mask[:, :, None]
        else:
            scores = torch.add(mask[:, :, None], scores, alpha=how.scaling)  # one pass; fp32 by the mask
        weights = scores.softmax(-1).to(v.dtype)
        out = weights.view(batch, k.shape[1], groups * queries, -1) @ v
    else:
        tiled = mask.to(q.dtype).repeat(1, 1, groups, 1)
        out = nn.functional.scaled_dot_product_attention(folded, k, v, attn_mask=tiled, scale=how.scaling)
    return out.reshape(batch, heads, queries, width)


def hidden(seen: Tensor) -> Tensor:
    """What is added to the scores so that only the `seen` keys count: 0 there and -inf elsewhere, fp32."""
    return torch.zeros(seen.shape, device=seen.device).masked_fill_(~seen, float("-inf"))


def use_plans(model: nn.Module) -> None:
    """Switch a `transformers` model to attention by plan, once."""
    known = cast(Any, model)
    if known.config._attn_implementation != NAME:
        from transformers import AttentionInterface

        # And no mask function: then `transformers` makes no mask, nor looks for several sequences in one row, for
        # which it would wait for the device in every pass.
        AttentionInterface.register(NAME, attention)
        known.set_attn_implementation(NAME)
        if known.config._attn_implementation != NAME:  # `transformers` only warns
            raise ValueError(f"{type(model).__name__} attends on its own and takes no plan")
