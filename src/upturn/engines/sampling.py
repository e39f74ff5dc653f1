"""Choosing the next token. One uniform number per draft and place, so a draft never depends on its neighbours."""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from upturn._model import Strict


class Config(Strict):
    """How drafts are sampled."""

    temperature: float = Field(default=0.7, ge=0)
    """0 is greedy."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Keep the smallest set of tokens with at least this probability."""
    max_new_tokens: int | None = Field(default=None, ge=1)
    """Longest answer in tokens; the task's own length when not given."""


def uniforms(seed: int, key: str, count: int) -> np.ndarray:
    """`count` numbers in [0, 1) that depend on the seed and the draft's key only."""
    digest = hashlib.sha256(f"{seed}/{key}".encode()).digest()
    return np.random.default_rng(np.frombuffer(digest, dtype=np.uint64)).random(count)


def choose(logits_BV: Tensor, uniform_B: Tensor, temperature: float, top_p: float) -> tuple[Tensor, Tensor]:
    """Next token of each row by inversion, and its log-probability under the unmodified model; `[B]`, `[B]`."""
    logits_BV = logits_BV.float()
    if temperature == 0:
        chosen = logits_BV.argmax(-1)
    else:
        probs = (logits_BV / temperature).softmax(-1)
        if top_p < 1:
            probs = _nucleus(probs, top_p)
        mass = probs.cumsum(-1)
        mark = uniform_B[:, None].to(mass.dtype) * mass[:, -1:]
        chosen = torch.searchsorted(mass, mark, right=True).squeeze(-1)
        last = probs.shape[-1] - 1 - (probs > 0).flip(-1).int().argmax(-1)  # rounding must not pick a zero
        chosen = torch.minimum(chosen, last)
    logprobs = logits_BV.gather(-1, chosen[:, None]).squeeze(-1) - logits_BV.logsumexp(-1)
    return chosen, logprobs


def _nucleus(probs: Tensor, top_p: float) -> Tensor:
    """Zero all tokens outside the smallest set that holds `top_p`."""
    size = min(256, probs.shape[-1])
    top, where = probs.topk(size, dim=-1)
    if bool((top.sum(-1) < top_p).any()):  # rare: a flat distribution needs the full sort
        top, where = probs.sort(-1, descending=True)
    keep = top.cumsum(-1) - top < top_p
    return torch.zeros_like(probs).scatter(-1, where, top * keep)
