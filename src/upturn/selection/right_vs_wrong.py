"""The first right draft against the nearest wrong one; attempts all right or all wrong make no pair."""

from __future__ import annotations

import math

from upturn._model import Strict
from upturn.selection._base import Key, Selection, collect, pair, same, text
from upturn.types import Attempt, Pair


class Config(Strict):
    """Which drafts make a pair."""

    reject_cut: bool = False
    """Whether a draft cut by the length limit may be rejected; it is never chosen."""


def uses_right(cfg: Config) -> bool:
    """Always."""
    return True


def select(attempts: list[Attempt], cfg: Config, key: Key = text) -> Selection:
    """One pair of each scored attempt. Of two wrong drafts equally near, the earlier is rejected.

    Dropped: 'no score', 'all right', 'all wrong', 'cut' (all right ones, or all wrong ones), 'same text'.
    """
    return collect(attempts, lambda attempt: _choose(attempt, cfg))


def _choose(attempt: Attempt, cfg: Config) -> list[Pair] | str:
    judged = [
        (draft, score.right)
        for draft, score in zip(attempt.drafts, attempt.scores, strict=True)
        if not math.isnan(score.value)
    ]
    if not judged:
        return "no score"
    if len({right for _, right in judged}) == 1:
        return "all right" if judged[0][1] else "all wrong"
    chosen = next((draft for draft, right in judged if right and draft.complete), None)
    wrong = [draft for draft, right in judged if not right and (draft.complete or cfg.reject_cut)]
    if chosen is None or not wrong:
        return "cut"
    rejected = min(wrong, key=lambda draft: (abs(draft.index - chosen.index), draft.index))
    return "same text" if same(chosen, rejected) else [pair(attempt, chosen, rejected)]
