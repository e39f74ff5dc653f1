"""FlexAttention over a token tree, for CUDA: its block mask made from blocks, and one compiled kernel for all layers.

A token's subtree is one stretch of places, so the first and last end of a block's tokens tell what the block is to the
later ones: no table of queries and keys is ever made. Axes: `T` tokens, `n` blocks.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional

from upturn.models import _compiled
from upturn.models._attention import How
from upturn.trees import TokenTree

BLOCK = 128
"""Tokens of a block of queries, and of keys: what FlexAttention is tuned for."""
LEAST_WIDTH = 16
"""Of a head, that the kernel takes."""
OPTIONS = {"FORCE_USE_FLEX_ATTENTION": True}
"""A few tokens would be left to another kernel, that of decoding, which has no backward pass."""


def block_mask(tree: TokenTree, window: int | None) -> Any:
    """The `BlockMask` of a tree. Nothing waits for the device."""
    from torch.nn.attention.flex_attention import BlockMask

    size, device = len(tree.ids_T), tree.ids_T.device
    count = -(-size // BLOCK)
    # The kernel may ask for places behind the last token: those see nothing. One more block, so that the sizes always
    # differ: the compiler takes two sizes that are equal by chance for one.
    fill = (0, (count + 1) * BLOCK - size)
    ends = functional.pad(tree.ends_T, fill).to(torch.int32)
    first, last = ends.view(-1, BLOCK)[:-1].aminmax(dim=1)
    begin = torch.arange(count, device=device, dtype=torch.int32)[:, None] * BLOCK
    itself = torch.eye(count, dtype=torch.bool, device=device)
    needed = (last > begin).tril(-1)
    full = needed & (first >= begin + BLOCK)  # never in the last row where that has places without a token
    full = full if window is None else torch.zeros_like(full)
    return BlockMask.from_kv_blocks(
        *_ordered((needed & ~full) | itself),
        *_ordered(full),
        BLOCK_SIZE=BLOCK,
        mask_mod=_visible(ends, functional.pad(tree.positions_T, fill).to(torch.int32), window),
        seq_lengths=(size, size),
    )


PARTS = [f"{full}{side}_{what}" for side in ("kv", "q") for full in ("", "full_") for what in ("num_blocks", "indices")]


def tensors_of(mask: Any) -> list[Tensor]:
    """All that a mask is made of, in one order."""
    return [*(getattr(mask, name) for name in PARTS), *mask.mask_mod.reads]


def _ordered(seen: Tensor) -> tuple[Tensor, Tensor]:
    """How many blocks of keys each block of queries sees, `[1, 1, n]`, and which, those first, `[1, 1, n, n]`."""
    order = seen.to(torch.int32).argsort(dim=1, descending=True, stable=True)
    return seen.sum(1, dtype=torch.int32)[None, None], order.to(torch.int32)[None, None]


def _visible(ends: Tensor, depth: Tensor, window: int | None) -> Any:
    """What the kernel asks of a query's and a key's place. It reads tensors only: a number would be compiled in."""

    def whole(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (k <= q) & (q < ends[k])

    if window is None:
        whole.reads = (ends,)  # type: ignore[attr-defined]
        return whole
    least = depth - window

    def near(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (k <= q) & (q < ends[k]) & (least[q] < depth[k])

    near.reads = (ends, least, depth)  # type: ignore[attr-defined]
    return near


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Any, how: How) -> Tensor | None:
    """`q [1, H, T, D]`, `k, v [1, Hkv, T, D]` -> `[1, T, H, D]`; None where no kernel can be compiled.

    Without gradients the graph of a training runs, too: another one might give other bits, and log-probs of policy and
    reference must be the same ones.
    """
    numbers = (repr(how.scaling), repr(how.softcap or 0.0))
    if not q.is_cuda:
        return run(q, k, v, mask, *numbers).transpose(1, 2)
    if q.shape[3] < LEAST_WIDTH:
        return None
    kernel = _compiled.function(run, q.shape[1], k.shape[1], q.shape[3], q.dtype, *numbers, dynamic=True)
    learns = torch.is_grad_enabled()
    with torch.enable_grad():
        parts = [_apart(x) for x in (q, k, v)]
        only_tokens_vary(*parts)
        out = kernel.tried(*parts, mask, *numbers)
    if out is None:
        return None
    return out.transpose(1, 2) if learns else out.detach().transpose(1, 2)


def _apart(x: Tensor) -> Tensor:
    """Learns, and is no view."""
    if not x.requires_grad:
        return x.detach().requires_grad_()
    return x if x._base is None else cast(Tensor, _Apart.apply(x))


class _Apart(torch.autograd.Function):
    """The same tensor, no longer a view of another one: the compiler tells views from others, and what is computed
    without gradients would not be run by the same code."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.detach()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:  # type: ignore[override]
        return g


def only_tokens_vary(*heads: Tensor) -> None:
    """All other sizes are compiled in: one that happens to equal the number of blocks would be taken for it."""
    for part in heads:
        torch._dynamo.mark_static(part, [0, 1, 3])


def run(q: Tensor, k: Tensor, v: Tensor, mask: Any, scaling: str, softcap: str) -> Tensor:
    """Scale and cap are text, which is compiled in: a float would become an input that the kernel cannot take."""
    from torch.nn.attention.flex_attention import flex_attention

    scale, cap = float(scaling), float(softcap)

    def score(s: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return cap * torch.tanh(s / cap)

    more: dict[str, Any] = {
        "score_mod": score if cap else None,
        "block_mask": mask,
        "scale": scale,
        "enable_gqa": q.shape[1] != k.shape[1],
        "kernel_options": OPTIONS if q.is_cuda else None,
    }
    return flex_attention(q, k, v, **more)  # type: ignore[return-value]
