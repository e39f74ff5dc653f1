"""Independent answers: no draft is shown another."""

from __future__ import annotations

import asyncio

from pydantic import Field

from upturn._model import Strict
from upturn.strategies._base import Sampler
from upturn.types import Draft, Prompt


class Config(Strict):
    """How many answers."""

    turns: int = Field(default=4, ge=1)
    """Drafts for each prompt; all of them are direct answers, at turn 1."""


async def generate(prompt: Prompt, sample: Sampler, cfg: Config) -> list[Draft]:
    """All drafts at once, each shown the prompt alone."""
    return await asyncio.gather(*(sample(prompt, shown=[]) for _ in range(cfg.turns)))
