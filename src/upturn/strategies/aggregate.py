"""Propose and aggregate: answers side by side, then one draft that is shown all of them (AFT, arXiv:2501.11877).

Between the two there may be hidden layers: as many drafts again, each shown all drafts of the layer before.
"""

from __future__ import annotations

import asyncio

from pydantic import Field

from upturn._model import Strict
from upturn.strategies._base import Sampler
from upturn.types import Draft, Prompt


class Config(Strict):
    """How wide and how deep."""

    proposals: int = Field(default=4, ge=1)
    """Direct answers, and drafts in each hidden layer."""
    layers: int = Field(default=0, ge=0)
    """Hidden layers."""

    @property
    def turns(self) -> int:
        """Turn of the last draft."""
        return self.layers + 2

    @property
    def num_drafts(self) -> int:
        """Proposals, hidden layers, and the last draft."""
        return self.proposals * (self.layers + 1) + 1


async def generate(prompt: Prompt, sample: Sampler, cfg: Config) -> list[Draft]:
    """One layer after the other, its drafts at once; contexts hold `proposals` drafts."""
    drafts: list[Draft] = []
    shown: list[Draft] = []
    for width in [cfg.proposals] * (cfg.layers + 1) + [1]:
        shown = await asyncio.gather(*(sample(prompt, shown=shown) for _ in range(width)))
        drafts += shown
    return drafts
