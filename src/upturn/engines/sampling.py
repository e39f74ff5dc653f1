"""Choosing the next token. One uniform number per draft and place, so a draft never depends on its neighbours."""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from upturn._model import Strict
from upturn.models.native import ops

BLOCK = 256
"""Tokens whose weights are summed before one of them is looked for."""
CHUNK = {"cpu": 1 << 20, "cuda": 1 << 26}
"""Logits that are turned into weights at once, by device. Temporaries of some 4 MB stay in reach of a CPU's caches; of
more than 16 MB they are new memory every time, which takes three times as long."""


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
    words = np.frombuffer(digest, dtype=np.uint32)  # of 32 bits, as the generator takes them: others are split slowly
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(words))).random(count)


def choose(logits_NV: Tensor, uniform_N: Tensor, temperature: float, top_p: float) -> tuple[Tensor, Tensor]:
    """Next token of each row by inversion, and its log-probability under the unmodified model; `[N]`, `[N]`."""
    if top_p == 1 and ops.usable(logits_NV) and logits_NV.is_contiguous():
        return ops.sample(logits_NV, uniform_N, temperature)
    rows = max(1, CHUNK.get(logits_NV.device.type, max(CHUNK.values())) // logits_NV.shape[-1])
    chunks = zip(logits_NV.split(rows), uniform_N.split(rows), strict=True)
    chosen, logprobs = zip(*(_choose(logits, uniform, temperature, top_p) for logits, uniform in chunks), strict=True)
    return torch.cat(chosen), torch.cat(logprobs)


def _choose(logits_BV: Tensor, uniform_B: Tensor, temperature: float, top_p: float) -> tuple[Tensor, Tensor]:
    shifted_BV = logits_BV.to(torch.float32, copy=True)
    shifted_BV -= shifted_BV.amax(-1, keepdim=True)
    weights_BV = shifted_BV.exp()  # two buffers in all: new memory costs more than the arithmetic
    total_B = weights_BV.sum(-1)
    if temperature == 0:
        chosen = shifted_BV.argmax(-1)
    else:
        if temperature != 1:
            torch.div(shifted_BV, temperature, out=weights_BV).exp_()
        if top_p < 1:
            weights_BV = _nucleus(weights_BV / weights_BV.sum(-1, keepdim=True), top_p)
        chosen = _invert(weights_BV, uniform_B)
    return chosen, shifted_BV.gather(-1, chosen[:, None]).squeeze(-1) - total_B.log()


def _invert(weights_BV: Tensor, uniform_B: Tensor) -> Tensor:
    """The first token whose cumulative share of the weights passes the uniform number, found by blocks, `[B]`."""
    batch, size = weights_BV.shape
    width = -(-size // BLOCK) * BLOCK
    if width > size:
        weights_BV = torch.nn.functional.pad(weights_BV, (0, width - size))
    blocks = weights_BV.view(batch, -1, BLOCK)
    mass = blocks.sum(-1).double().cumsum(-1)
    mark = uniform_B[:, None].to(mass.dtype) * mass[:, -1:]
    block = torch.searchsorted(mass, mark, right=True).clamp(max=mass.shape[-1] - 1)
    inner = blocks[torch.arange(batch, device=block.device), block.squeeze(-1)].double()
    before = mass.gather(-1, block) - inner.sum(-1, keepdim=True)
    place = torch.searchsorted(inner.cumsum(-1), mark - before, right=True).squeeze(-1)
    last = BLOCK - 1 - (inner > 0).flip(-1).int().argmax(-1)  # rounding must not pick a zero
    return block.squeeze(-1) * BLOCK + torch.minimum(place, last)


def _nucleus(probs: Tensor, top_p: float) -> Tensor:
    """Zero all tokens outside the smallest set that holds `top_p`."""
    size = min(256, probs.shape[-1])
    top, where = probs.topk(size, dim=-1)
    if bool((top.sum(-1) < top_p).any()):  # rare: a flat distribution needs the full sort
        top, where = probs.sort(-1, descending=True)
    keep = top.cumsum(-1) - top < top_p
    return torch.zeros_like(probs).scatter(-1, where, top * keep)
