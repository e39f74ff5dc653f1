"""Chain of self-refinement: each draft is shown the one before it (EVOLVE, arXiv:2502.05605)."""

from __future__ import annotations

from pydantic import Field

from upturn._model import Strict
from upturn.strategies._base import Sampler
from upturn.types import Draft, Prompt


class Config(Strict):
    """How long the chain is."""

    turns: int = Field(default=4, ge=1)
    """Drafts for each prompt: the direct answer, then the refinements."""


async def generate(prompt: Prompt, sample: Sampler, cfg: Config) -> list[Draft]:
    """One draft after the other, the last one shown."""
    drafts = [await sample(prompt, shown=[])]
    while len(drafts) < cfg.turns:
        drafts.append(await sample(prompt, shown=drafts[-1:]))
    return drafts
