"""Answer, criticise, answer again: Self-Refine (arXiv:2303.17651).

Differs   The paper shows all earlier answers and critiques; here the last answer and its critique are shown.
"""

from __future__ import annotations

from dataclasses import replace

from pydantic import Field

from upturn._model import Strict
from upturn.strategies._base import Sampler
from upturn.types import Draft, Prompt


class Config(Strict):
    """How often, and in which words."""

    turns: int = Field(default=4, ge=1)
    """Answers for each prompt: the direct answer, then the refinements; kept answers are among them."""
    stop: str = "no changes needed"
    """A critique that ends with these words, whatever their case and the marks around them, keeps the answer for all
    turns that are left; empty: none does."""

    @property
    def num_drafts(self) -> int:
        """Answers, and the critiques between them."""
        return 2 * self.turns - 1


async def generate(prompt: Prompt, sample: Sampler, cfg: Config) -> list[Draft]:
    """Answer, critique, answer and so on, each one shown the last answer and what was said of it."""
    answer = await sample(prompt, shown=[])
    drafts = [answer]
    while answer.turn < cfg.turns:
        critique = await sample(prompt, shown=[answer], kind="critique")
        drafts.append(critique)
        if cfg.stop and _bare(critique.text).endswith(_bare(cfg.stop)):
            return [*drafts, *_kept(answer, critique, cfg.turns)]
        answer = await sample(prompt, shown=[answer, critique])
        drafts.append(answer)
    return drafts


def _bare(text: str) -> str:
    return text.lower().strip(" \n.!?\"'“”‘’*_()")


def _kept(answer: Draft, critique: Draft, turns: int) -> list[Draft]:
    """The answer as that of all turns to come, at no cost: what somebody holds who heeds the stop signal."""
    kept: list[Draft] = []
    shown = [answer, critique]
    free = replace(answer, kept=True, num_tokens_told=0, prompt_tokens=0, cached_tokens=0, request="")
    for turn in range(answer.turn + 1, turns + 1):
        kept.append(replace(free, index=shown[-1].index + 1, turn=turn, parents=tuple(draft.index for draft in shown)))
        shown = kept[-1:]
    return kept
