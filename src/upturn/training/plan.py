"""Which examples go into which step and micro-batch: fixed before training, so a resumed run takes the same."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import Field, model_validator

from upturn._model import Strict

TREE_TOKENS = {"cpu": 4096, "cuda": 16384}
"""Tokens of a micro-batch where the configuration names none: fewer keep a CUDA device waiting for its next launch."""


class Config(Strict):
    """Optimisation settings, with the names Transformers and TRL use."""

    learning_rate: float = Field(default=1e-5, gt=0)
    num_train_epochs: float = Field(default=1.0, gt=0)
    """Passes over the examples; a part of a pass is allowed."""
    train_batch_size: int = Field(default=32, ge=1)
    """Examples (pairs, or groups of drafts) per optimizer step, over all micro-batches."""
    max_tree_tokens: int | None = Field(default=None, ge=1)
    """Tokens of one micro-batch after folding; None: what suits the device. One prompt's tree is never cut."""
    lr_scheduler_type: str = Field(default="cosine", pattern="^(constant|linear|cosine)$")
    warmup_ratio: float = Field(default=0.0, ge=0, lt=1)
    weight_decay: float = Field(default=0.0, ge=0)
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    max_grad_norm: float = Field(default=1.0, gt=0)
    max_steps: int | None = Field(default=None, ge=1)
    """Stop after so many optimizer steps."""
    save_seconds: float = Field(default=60.0, ge=0)
    """Time between checkpoints; a kill costs at most this much. Never changes the result."""

    def tree_tokens(self, device: str = "cpu") -> int:
        """Tokens of one micro-batch on a kind of device."""
        return self.max_tree_tokens or TREE_TOKENS.get(device, TREE_TOKENS["cpu"])

    def key(self) -> dict[str, Any]:
        """What tells trainings apart. Where they run does not, so a number of tokens that the device chooses is that of
        a CPU."""
        return self.model_dump(exclude={"save_seconds"}) | {"max_tree_tokens": self.tree_tokens()}

    @model_validator(mode="after")
    def _betas(self) -> Config:
        if not (0 <= self.adam_beta1 < 1 and 0 <= self.adam_beta2 < 1):
            raise ValueError("adam_beta1 and adam_beta2 lie in [0, 1)")
        return self


@dataclass(frozen=True, slots=True)
class Step:
    """One optimizer step: micro-batches of numbers of examples."""

    micro_batches: tuple[tuple[int, ...], ...]
    epoch: int


def steps(sizes: Sequence[int], cfg: Config, seed: int, device: str = "cpu") -> list[Step]:
    """The whole training as steps. `sizes` are tree tokens per example; an epoch's last batch may be smaller."""
    per_epoch = -(-len(sizes) // cfg.train_batch_size)
    total = max(1, round(per_epoch * cfg.num_train_epochs))
    total = min(total, cfg.max_steps or total)
    planned: list[Step] = []
    epoch = 0
    while len(planned) < total:
        order = list(range(len(sizes)))
        random.Random(f"{seed}/{epoch}").shuffle(order)
        for first in range(0, len(order), cfg.train_batch_size):
            chosen = order[first : first + cfg.train_batch_size]
            planned.append(Step(_micro_batches(chosen, sizes, cfg.tree_tokens(device)), epoch))
        epoch += 1
    return planned[:total]


def _micro_batches(chosen: list[int], sizes: Sequence[int], budget: int) -> tuple[tuple[int, ...], ...]:
    """Examples sorted by size and cut by the token budget: trees of one micro-batch are alike."""
    batches: list[list[int]] = []
    room = 0
    for example in sorted(chosen, key=lambda e: (-sizes[e], e)):
        if not batches or sizes[example] > room:
            batches.append([])
            room = budget
        batches[-1].append(example)
        room -= sizes[example]
    return tuple(tuple(batch) for batch in batches)


def learning_rate(step: int, total: int, cfg: Config) -> float:
    """Rate of a step (from 0): linear warm-up, then the schedule towards 0."""
    import math

    warmup = math.ceil(cfg.warmup_ratio * total)
    if step < warmup:
        return cfg.learning_rate * (step + 1) / warmup
    share = (step - warmup) / max(1, total - warmup)
    factor = {"constant": 1.0, "linear": 1 - share, "cosine": 0.5 * (1 + math.cos(math.pi * share))}
    return cfg.learning_rate * factor[cfg.lr_scheduler_type]
