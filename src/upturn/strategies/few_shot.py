"""Few-shot self-refinement: each draft is shown all earlier ones."""

from __future__ import annotations

from pydantic import Field

from upturn._model import Strict
from upturn.strategies._base import Sampler
from upturn.types import Draft, Prompt


class Config(Strict):
    """How many drafts."""

    turns: int = Field(default=4, ge=1)
    """Drafts for each prompt: the direct answer, then the refinements."""


async def generate(prompt: Prompt, sample: Sampler, cfg: Config) -> list[Draft]:
    """One draft after the other, all earlier ones shown; contexts grow with the number of turns."""
    drafts: list[Draft] = []
    while len(drafts) < cfg.turns:
        drafts.append(await sample(prompt, shown=tuple(drafts)))
    return drafts
