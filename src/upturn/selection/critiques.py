"""Drafts with what the verifier says of them, and wrong ones put right: to learn to criticise and then to refine.

A wrong draft is put right by the right draft of the same prompt that is most like it, so that refining is mending and
not writing anew. Prompts without a right draft still teach their critiques. After Saunders et al. (2022,
arXiv:2206.05802) and Critique Fine-Tuning (arXiv:2501.17703), whose critiques come from people and a stronger model.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from difflib import SequenceMatcher

from pydantic import Field

from upturn._model import Strict
from upturn.selection._base import Key, Selection, collect, distinct, judged, text
from upturn.types import Attempt, Draft, Group, written_critique


class Config(Strict):
    """How much of each prompt is learnt."""

    drafts: int = Field(default=6, ge=1)
    """Drafts that are criticised, at most; half of them right ones where there are so many."""


def uses_right(cfg: Config) -> bool:
    """Always."""
    return True


def select(attempts: list[Attempt], cfg: Config, key: Key = text) -> Selection:
    """A group of each scored attempt: direct answers where they are right, critiques, and right refinements, value 1.

    Drafts are direct answers of distinct texts, chosen by a seed from the prompt's id; wrong ones are only shown.
    Dropped: 'no score', 'cut' (no direct answer is complete), 'no critique' (the scorer gave none).
    """
    return collect(attempts, lambda attempt: _choose(attempt, cfg))


def _choose(attempt: Attempt, cfg: Config) -> list[Group] | str:
    scores = judged(attempt)
    if not scores:
        return "no score"
    direct = distinct(d for d in attempt.drafts if d.index in scores and d.complete and d.turn == 1)
    if not direct:
        return "cut"
    if not all(scores[draft.index].critique for draft in direct):
        return "no critique"
    random.Random(attempt.prompt.id).shuffle(direct)
    right = [draft for draft in direct if scores[draft.index].right]
    wrong = [draft for draft in direct if not scores[draft.index].right]
    room = max(cfg.drafts // 2, cfg.drafts - len(wrong))
    chosen = [*right[:room], *wrong[: cfg.drafts - len(right[:room])]]
    learnt: list[Draft] = []
    values: list[float | None] = []
    for draft in chosen:
        is_right = scores[draft.index].right
        mended = [] if is_right or not right else [_nearest(draft, right)]
        learnt += _taught(len(learnt), draft, scores[draft.index].critique, mended)
        values += [1.0 if is_right else None, 1.0, *[1.0] * len(mended)]
    return [Group(Attempt(attempt.prompt, tuple(learnt)), tuple(values))]


def _nearest(draft: Draft, right: Sequence[Draft]) -> Draft:
    """The right draft that shares most with this one, word by word in order; of equals the first."""
    words = draft.text.split()
    return max(right, key=lambda other: SequenceMatcher(None, words, other.text.split(), autojunk=False).ratio())


def _taught(first: int, draft: Draft, said: str, mended: Sequence[Draft]) -> list[Draft]:
    """The draft from place `first` on, its critique, and what is to follow."""
    answer = replace(draft, index=first, parents=())
    refined = [replace(right, index=first + 2, turn=2, parents=(first, first + 1)) for right in mended]
    return [answer, written_critique(answer, said), *refined]
