"""What every task offers: prompts, and an exact judgement of an answer. The reference answer stays in here."""

from __future__ import annotations

from typing import Literal, Protocol

from upturn.types import Prompt, Score

Split = Literal["train", "test"]


class Task(Protocol):
    """A source of prompts with a verifier.

    A task file holds `Config` (a strict, frozen pydantic model) and `load(config) -> Task`.
    """

    refine_request: str
    """What the user says after a draft to ask for a better one.

    A task may have two more attributes:
        critique_request: str   what the user says to have a draft criticised
        key: str                digest of what judges: references and, for a verifier of your own, its source file;
                                '' or absent where the config says it all. With another key, answers are judged anew.
    """
    max_new_tokens: int
    """A length that fits nearly every good answer, and every critique that the verifier writes."""

    def prompts(self, split: Split, start: int, count: int) -> list[Prompt]:
        """`count` prompts from place `start` of a split; generated tasks never run out, files may return fewer.

        Ids are unique over both splits, and no prompt text of `test` occurs in `train`.
        """
        ...

    def grade(self, prompt: Prompt, answer: str) -> Score:
        """Judge one answer: partial credit in [0, 1], and whether it is right. Never raises on odd text."""
        ...

    def vote_key(self, prompt: Prompt, answer: str) -> str:
        """The canonical final answer for majority votes; '' where the answer has none."""
        ...
