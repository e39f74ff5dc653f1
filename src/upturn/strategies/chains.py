"""Several chains of self-refinement of one prompt, for rules that compare drafts of the same turn."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from pydantic import Field

from upturn._model import Strict
from upturn.strategies._base import Sampler
from upturn.types import Draft, Prompt


class Config(Strict):
    """How many chains, and how long they are."""

    chains: int = Field(default=4, ge=1)
    """Independent chains for each prompt."""
    turns: int = Field(default=2, ge=1)
    """Drafts in each chain: the direct answer, then the refinements."""

    @property
    def num_drafts(self) -> int:
        """Drafts in all chains."""
        return self.chains * self.turns


async def generate(prompt: Prompt, sample: Sampler, cfg: Config) -> list[Draft]:
    """Turn by turn, all chains at once: draft i belongs to chain i modulo `chains`.

    A chain waits for the others at each turn, so that a draft's index, and with it its random numbers, does not depend
    on which chain is the faster.
    """
    drafts: list[Draft] = []
    shown: list[Sequence[Draft]] = [()] * cfg.chains
    for _ in range(cfg.turns):
        latest = await asyncio.gather(*(sample(prompt, shown=last) for last in shown))
        drafts += latest
        shown = [(draft,) for draft in latest]
    return drafts
