"""Decoder layers of the common kind: RMS norm, attention with rotary embeddings, gated MLP with SiLU.

Llama, Mistral, Qwen and relatives are made of them. Their faster forwards (`fused`, `_gpu_layer`, `_fused_layer`,
`_compiled_layer`) are tried against the layer's own on some numbers, and stand in its place for a while.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from upturn.models import packed
from upturn.models._attention import How

Result = TypeVar("Result")
PARTS = {"input_layernorm", "self_attn", "post_attention_layernorm", "mlp"}
ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}
MLP = {"gate_proj", "up_proj", "down_proj", "act_fn"}
SILU = {"SiLU", "SiLUActivation"}
CLOSE = {torch.bfloat16: 0.03, torch.float16: 0.004, torch.float32: 1e-4, torch.float64: 1e-4}
"""Largest difference that rounding explains, relative to the largest number of the output; norms compute in fp32."""


def layers_of(model: nn.Module) -> list[nn.Module]:
    """The decoder layers; none where the model is built in another way."""
    decoder = cast(Any, model).get_decoder() if hasattr(model, "get_decoder") else model
    return list(getattr(decoder, "layers", ()))


def is_common(layer: nn.Module) -> bool:
    """Made of the common parts, plain ones. Whether it computes the same must be tried."""
    named: dict[str, Any] = dict(layer.named_children())
    if set(named) != PARTS or "forward" in layer.__dict__:
        return False
    attention, mlp = named["self_attn"], named["mlp"]
    inner, outer = dict(attention.named_children()), dict(mlp.named_children())
    linears = [part for name, part in (*inner.items(), *outer.items()) if name.endswith("_proj")]
    norms = [part for name, part in (*named.items(), *inner.items()) if name.endswith("norm")]
    known = set(inner) - {"q_norm", "k_norm"} == ATTENTION and set(outer) == MLP
    plain = all(packed.is_plain(part) for part in linears) and all(hasattr(n, "variance_epsilon") for n in norms)
    hooked = any(part._forward_hooks or part._forward_pre_hooks for part in layer.modules())
    if not known or not plain or hooked or len({weight.dtype for weight in layer.parameters()}) > 1:
        return False
    return type(mlp.act_fn).__name__ in SILU


@contextmanager
def swapped(forwards: Mapping[Any, Callable[..., Tensor]]) -> Iterator[None]:
    """Inside, these layers have other forwards."""
    for layer, forward in forwards.items():
        layer.forward = forward
    try:
        yield
    finally:
        for layer in forwards:
            del layer.forward


def plain(layer: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
    """The layer's own forward, whatever stands before it at the moment."""
    return type(layer).forward(layer, *args, **kwargs)


def is_usual(layer: Any, hidden_states: Tensor, kwargs: Mapping[str, Any]) -> bool:
    """Whether a call is of the kind that was tried: one row, and whole heads turned by numbers of the same type."""
    around, shape = kwargs.get("position_embeddings"), (1, hidden_states.shape[1], layer.self_attn.head_dim)
    if not isinstance(around, tuple) or len(around) != 2 or len(hidden_states) != 1:
        return False
    return all(x.shape == shape and x.dtype == hidden_states.dtype and x.is_contiguous() for x in around)


def asked_by(layer: nn.Module) -> How | None:
    """How a layer's own forward asks to attend; None where it cannot be called like the others."""
    (x, around), causal = probe(layer), Causal()
    with torch.no_grad():
        tried(partial(plain, layer, x, **around, upturn_plan=causal))
    return causal.how


def tried(work: Callable[[], Result]) -> Result | None:
    """What it gives; None where it fails, in whatever way: a layer may want to be called in another one."""
    try:
        return work()
    except torch.OutOfMemoryError:
        raise
    except Exception:
        return None


def probe(layer: nn.Module) -> tuple[Tensor, dict[str, Any]]:
    """Some numbers to try both ways: five tokens at places that are not in a row."""
    attention: Any = layer.self_attn
    weight: Tensor = attention.q_proj.weight
    generator = torch.Generator().manual_seed(0)
    x = (torch.randn(1, 5, weight.shape[1], generator=generator) / 64).to(weight.dtype)  # so that it hides no branch
    angle = torch.rand(1, 5, attention.head_dim // 2, generator=generator).repeat(1, 1, 2) * 6
    return x.to(weight.device), {"position_embeddings": (angle.cos().to(weight), angle.sin().to(weight))}


def close(plain: Tensor, other: Tensor) -> bool:
    """Whether rounding explains the difference."""
    return bool((plain - other).abs().max() <= CLOSE[plain.dtype] * plain.abs().max())


class Causal:
    """Plain causal attention over all tokens, whatever the layer's window; notes how it was asked, and with what."""

    how: How | None = None
    seen: tuple[Tensor, ...] = ()

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, how: How) -> Tensor:
        """See `Plan`."""
        self.how, self.seen = how, (q, k, v)
        k, v = (part.repeat_interleave(q.shape[1] // part.shape[1], 1) for part in (k, v))
        out = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=how.scaling)
        return out.transpose(1, 2).contiguous()
