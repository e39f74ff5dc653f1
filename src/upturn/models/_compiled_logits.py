"""The passes over logits on CUDA, compiled; named as those of the kernels (`native.back`).

Axes: `N` targets, `I` ids of a part of the vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from upturn.models import _compiled

TYPES = (torch.bfloat16, torch.float32)
IDS = 16384
"""Most ids per pass, a power of 2. Part of the numerics, as `MOST` is: policy and reference use the same."""
MOST = 2**29
"""Most logits of one pass: 1 GiB in bfloat16."""


def ids_of(targets: int) -> int:
    """Ids per pass, so that their logits are not too many."""
    ids = IDS
    while ids > 128 and ids * targets > MOST:
        ids //= 2
    return ids


def logits_seen(logits: Tensor, first: int, targets: Tensor, sums: tuple[Tensor, Tensor, Tensor]) -> None:
    """Take in logits `[N, I]` of ids from `first` on: largest, sum of exponentials, the target's; `[N]` fp32."""
    _run(_seen_, logits, targets - first, *sums)


def logits_back_(logits: Tensor, first: int, targets: Tensor, log_total: Tensor, g: Tensor) -> None:
    """The logits become their gradient, given that of the target's log-prob, `[N]` fp32."""
    _run(_back_, logits, targets - first, log_total, g)


def product(x: Tensor, y: Tensor) -> Tensor:
    """Matrix product in the type of both."""
    return x @ y


def weight_gradient(g: Tensor, x: Tensor) -> Tensor:
    """Of a linear layer with input `x [N, d]` and output gradient `g [N, I]`: `[I, d]`."""
    return g.t() @ x


def add_gradient(g: Tensor, total: Tensor, *, is_first: bool) -> None:
    """Add a gradient to its fp32 sum, or begin the sum."""
    total.copy_(g) if is_first else total.add_(g)


def _run(work: object, logits: Tensor, *by_target: Tensor) -> None:
    bare = [part.detach() for part in (logits, *by_target)]
    _compiled.by_tokens(*bare)
    _compiled.function(work, logits.shape[1], logits.dtype)(*bare)


def _seen_(logits: Tensor, local: Tensor, top: Tensor, total: Tensor, picked: Tensor) -> None:
    wide, width = logits.float(), logits.shape[1]
    highest = torch.maximum(top, wide.amax(1))
    total.copy_(total * (top - highest).exp() + (wide - highest[:, None]).exp().sum(1))
    found = wide.gather(1, local.clamp(0, width - 1)[:, None])[:, 0]
    picked.copy_(torch.where((local >= 0) & (local < width), found, picked))
    top.copy_(highest)


def _back_(logits: Tensor, local: Tensor, log_total: Tensor, g: Tensor) -> None:
    share = (logits.float() - log_total[:, None]).exp()
    is_target = torch.arange(logits.shape[1], device=logits.device) == local[:, None]
    logits.copy_((is_target.float() - share) * g[:, None])
