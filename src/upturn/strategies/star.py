"""Star of self-refinement: independent refinements of the same first draft."""

from __future__ import annotations

import asyncio

from pydantic import Field

from upturn._model import Strict
from upturn.strategies._base import Sampler
from upturn.types import Draft, Prompt


class Config(Strict):
    """How many drafts."""

    turns: int = Field(default=4, ge=1)
    """Drafts for each prompt: the direct answer, then its refinements, all of them at turn 2."""


async def generate(prompt: Prompt, sample: Sampler, cfg: Config) -> list[Draft]:
    """The first draft, then all refinements of it at once."""
    first = await sample(prompt, shown=[])
    return [first, *await asyncio.gather(*(sample(prompt, shown=[first]) for _ in range(cfg.turns - 1)))]
