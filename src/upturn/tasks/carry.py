"""The embedded world: fixed-width addition written most significant digit first, so that carries must be foreseen."""

from __future__ import annotations

import hashlib
import random

from upturn._model import Strict
from upturn.tasks import _carry_rules as rules
from upturn.tasks._base import Split, Task
from upturn.types import Prompt, Score

TEST_SHARE = 0.2
"""Share of all problems that are kept for the test split."""


class Config(Strict):
    """How the problems are drawn."""

    seed: int = 0
    """Another seed gives other problems; no problem changes its split."""


def load(cfg: Config) -> Task:
    """The task; it holds no state."""
    return Carry(cfg)


class Carry:
    """Problems drawn by (seed, split, place), without end."""

    refine_request = "improve"
    max_new_tokens = rules.WIDTH + 2

    def __init__(self, cfg: Config) -> None:
        self.cfg = cfg

    def prompts(self, split: Split, start: int, count: int) -> list[Prompt]:
        """`count` problems from place `start`; never fewer."""
        return [self._prompt(split, place) for place in range(start, start + count)]

    def grade(self, prompt: Prompt, answer: str) -> Score:
        """Share of right digits, and whether the sum is right."""
        value, right = rules.grade(prompt.text, answer)
        return Score(value, right, "" if right else "wrong sum")

    def vote_key(self, prompt: Prompt, answer: str) -> str:
        """The answer itself."""
        return answer.strip()

    def _prompt(self, split: Split, place: int) -> Prompt:
        rng = random.Random(f"{self.cfg.seed} {split} {place}")
        text = rules.make_problem(rng)
        while _split_of(text) != split:
            text = rules.make_problem(rng)
        return Prompt(f"carry-{split}-{self.cfg.seed}-{place}", text)


def _split_of(text: str) -> Split:
    digest = hashlib.sha256(text.encode()).digest()
    return "test" if int.from_bytes(digest[:8]) < TEST_SHARE * 2**64 else "train"
