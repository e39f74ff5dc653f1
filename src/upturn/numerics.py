"""The tensor arithmetic that objectives and models share."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

HEAD_CHUNK = 512
"""Target positions per pass through the output layer. Part of the numerics: policy and reference use the same."""


def sum_by_sample(values_N: Tensor, owner_N: Tensor, num_samples: int) -> Tensor:
    """Sum per-token values into their samples, `[N] -> [S]`, in fp32 or better."""
    wide = values_N if values_N.dtype == torch.float64 else values_N.float()
    return wide.new_zeros(num_samples).index_add(0, owner_N, wide)


def token_logprobs(hidden_N: Tensor, targets_N: Tensor, head: Callable[[Tensor], Tensor]) -> Tensor:
    """Log-probabilities of target ids from hidden states, `[N, d], [N] -> [N]` fp32.

    The output layer runs on chunks and again in the backward pass, so no `[N, V]` tensor is kept.
    """

    def chunk(hidden: Tensor, targets: Tensor) -> Tensor:
        logits = head(hidden)
        logits = logits if logits.dtype == torch.float64 else logits.float()
        return logits.gather(-1, targets[:, None]).squeeze(-1) - logits.logsumexp(-1)

    parts = []
    for hidden, targets in zip(hidden_N.split(HEAD_CHUNK), targets_N.split(HEAD_CHUNK), strict=True):
        if torch.is_grad_enabled():
            parts.append(checkpoint(chunk, hidden, targets, use_reentrant=False))
        else:
            parts.append(chunk(hidden, targets))
    return torch.cat(parts) if parts else hidden_N.new_zeros(0, dtype=torch.float32)
