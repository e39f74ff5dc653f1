"""Rough tokens and times for `--dry-run`: arithmetic from parameter count and a short matrix product, nothing more."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

ANSWER_SHARE = 0.6
"""Length of a usual answer as a share of the longest allowed."""
PROMPT_TOKENS = 64
"""Tokens of a usual question with its template."""
EFFICIENCY = {"generate": 0.15, "train": 0.35}
"""Share of the matrix rate that a step usually reaches."""
DRAFTS_PER_GROUP = 8
"""Drafts of a group that are learned from, as far as can be told before they are made."""
FLOPS_PER_TOKEN = {"generate": 2 * 1.5, "train": 8}
"""Per parameter; generation also computes contexts, training also the reference."""


@dataclass(frozen=True, slots=True)
class Speed:
    """What this machine does with this model."""

    parameters: float
    flops: float

    def seconds(self, step: str, tokens: int) -> float:
        """Expected seconds of a step; 0 for the light ones."""
        if step not in EFFICIENCY:
            return 0.0
        return tokens * self.parameters * FLOPS_PER_TOKEN[step] / (EFFICIENCY[step] * self.flops)


def training_tokens(pairs: int, rows: int, max_new_tokens: int, epochs: float) -> int:
    """Tree tokens of a training: the question once, each row its answer, each draft shown once."""
    answer = ANSWER_SHARE * max_new_tokens
    return round(epochs * pairs * (PROMPT_TOKENS + rows * answer))


def measure(folder: Path, dtype: str) -> Speed:
    """Parameters from the size of the weights, and the machine's rate at one matrix product."""
    import torch

    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    kind = torch.float32 if dtype == "float32" else torch.bfloat16
    device = "cuda" if torch.cuda.is_available() else "cpu"
    left, right = torch.ones(256, 1024, dtype=kind, device=device), torch.ones(1024, 1024, dtype=kind, device=device)
    product = left @ right
    product.sum().item()
    began = time.perf_counter()
    for _ in range(8):
        product = left @ right
    product.sum().item()
    return Speed(size / 2, 8 * 2 * 256 * 1024 * 1024 / (time.perf_counter() - began))
