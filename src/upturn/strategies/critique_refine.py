"""Answer, criticise, answer again: Self-Refine (arXiv:2303.17651).

Differs   The paper shows all earlier answers and critiques; here the last answer and its critique are shown.
"""

from __future__ import annotations

from pydantic import Field

from upturn._model import Strict
from upturn.strategies._base import Sampler
from upturn.types import Draft, Prompt


class Config(Strict):
    """How often, and in which words."""

    turns: int = Field(default=4, ge=1)
    """Answers for each prompt, at most: the direct answer, then the refinements."""
    critique_request: str = Field(
        default="Check this answer step by step. Name each mistake and say how to mend it, but do not write a new "
        "answer. If nothing is wrong, write: no changes needed.",
        min_length=1,
    )
    """What the user says behind an answer to get a critique."""
    revise_request: str = "Now write the whole answer again, with every mistake named above mended."
    """What the user says behind the critique; empty for the task's own request to refine."""
    stop: str = "no changes needed"
    """A critique with these words, in small or capital letters, is the last draft; empty: none is."""

    @property
    def num_drafts(self) -> int:
        """Answers, and the critiques between them."""
        return 2 * self.turns - 1


async def generate(prompt: Prompt, sample: Sampler, cfg: Config) -> list[Draft]:
    """Answer, critique, answer and so on, each one shown the last answer and what was said of it."""
    answer = await sample(prompt, shown=[])
    drafts = [answer]
    while len(drafts) < cfg.num_drafts:
        critique = await sample(prompt, shown=[answer], request=cfg.critique_request, kind="critique")
        drafts.append(critique)
        if cfg.stop and cfg.stop.lower() in critique.text.lower():
            break
        answer = await sample(prompt, shown=[answer, critique], request=cfg.revise_request)
        drafts.append(answer)
    return drafts
