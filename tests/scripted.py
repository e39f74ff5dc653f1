"""Scripted attempts: what a model might have said, made without one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import numpy as np
from hypothesis import strategies as st

from upturn.types import Attempt, Draft, Prompt, Score

Habit = Literal["copies", "churns", "refines", "harms"]


def chain(
    id: str, pattern: str, texts: Sequence[str] = (), answers: Sequence[str] = (), tokens: Sequence[int] = (2, 3, 4, 5)
) -> Attempt:
    """A letter per turn, r right or w wrong; the texts all differ unless they are told."""
    texts = texts or [f"draft {turn} of {id}" for turn in range(len(pattern))]
    drafts = [_draft(k, k + 1, (k - 1,) if k else (), text, tokens[k], 3 * k) for k, text in enumerate(texts)]
    return Attempt(Prompt(id, "question"), tuple(drafts), _scores(pattern, answers))


def parallel(id: str, pattern: str, texts: Sequence[str] = (), answers: Sequence[str] = ()) -> Attempt:
    """As many direct answers as letters."""
    texts = texts or [f"answer {place} of {id}" for place in range(len(pattern))]
    drafts = [_draft(k, 1, (), text, 2, 0) for k, text in enumerate(texts)]
    return Attempt(Prompt(id, "question"), tuple(drafts), _scores(pattern, answers))


def rewarded(attempt: Attempt, *values: float) -> Attempt:
    """The same drafts with a reward model's values."""
    return replace(attempt, scores=tuple(Score(value, False) for value in values))


def _draft(index: int, turn: int, parents: tuple[int, ...], text: str, tokens: int, shown: int) -> Draft:
    return Draft(index, turn, parents, text, (7,) * tokens, (-0.5,) * tokens, "stop", 5 + shown, shown)


def _scores(pattern: str, answers: Sequence[str]) -> tuple[Score, ...]:
    answers = answers or [""] * len(pattern)
    return tuple(Score(float(c == "r"), c == "r", answer=answer) for c, answer in zip(pattern, answers, strict=True))


def difficulties(seed: int, num_prompts: int = 300, easier: float = 0.0) -> np.ndarray:
    """The chance that a direct answer is right, per prompt: half of the prompts are nearly always or never solved."""
    return np.clip(np.random.default_rng(seed).beta(0.8, 1.2, num_prompts) + easier, 0, 1)


def model(
    seed: int, habit: Habit, chances: np.ndarray, num_parallel: int = 4, turns: int = 4
) -> tuple[list[Attempt], list[Attempt]]:
    """Chains and direct answers of a model with one habit.

    copies: 95 % of refinements repeat the draft, the others are fresh answers. churns: all are fresh answers. refines:
    repairs 30 % of wrong drafts and breaks 4 % of right ones. harms: repairs 2 % and breaks 20 %.
    """
    rng = np.random.default_rng(seed)
    chains, siblings = [], []
    for place, chance in enumerate(chances):
        right, texts = [bool(rng.random() < chance)], ["draft 0"]
        for turn in range(1, turns):
            copied = habit == "copies" and rng.random() < 0.95
            right.append(right[-1] if copied else _refined(rng, habit, right[-1], chance))
            texts.append(texts[-1] if copied else f"draft {turn}")
        chains.append(chain(f"p{place}", _letters(right), texts, _answers(rng, right)))
        fresh = [bool(one) for one in rng.random(num_parallel) < chance]
        siblings.append(parallel(f"p{place}", _letters(fresh), answers=_answers(rng, fresh)))
    return chains, siblings


def _refined(rng: np.random.Generator, habit: Habit, right: bool, chance: float) -> bool:
    keeps, repairs = {"refines": (0.96, 0.30), "harms": (0.80, 0.02)}.get(habit, (chance, chance))
    return bool(rng.random() < (keeps if right else repairs))


def _letters(right: Sequence[bool]) -> str:
    return "".join("r" if one else "w" for one in right)


def _answers(rng: np.random.Generator, right: Sequence[bool]) -> list[str]:
    """The right answer is 0; wrong ones scatter over five others."""
    return ["0" if one else str(rng.integers(1, 6)) for one in right]


def chains(rows: Sequence[str]) -> list[Attempt]:
    """A prompt per pattern; final answers are as right as their drafts."""
    return [chain(str(place), row, answers=row) for place, row in enumerate(rows)]


patterns = st.lists(st.text("rw", min_size=3, max_size=3), min_size=1, max_size=20)
"""Any chains of three turns."""

CHAIN = [
    chain("a", "wrr", ["a b c", "a b d", "a b d"], "122"),
    chain("b", "rrw", ["x", "y", "z"], "556"),
    chain("c", "www", ["same", "same", "same"], "999"),
    chain("d", "rrr", ["p q", "p q", "p"], "777"),
]
"""Four prompts to work by hand: two, three and four generated tokens, five, eight and eleven context tokens."""
