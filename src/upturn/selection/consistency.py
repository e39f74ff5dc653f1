"""The last draft against the first, where the last ones agree on the answer (Sherlock, arXiv:2505.22651)."""

from __future__ import annotations

from pydantic import Field

from upturn._model import Strict
from upturn.selection._base import Key, Selection, collect, pair, text
from upturn.types import Attempt, Pair


class Config(Strict):
    """Which drafts make a pair."""

    agree: int = Field(default=3, ge=2)
    """So many of the last drafts must give the same answer."""
    reject_cut: bool = False
    """Whether a first draft cut by the length limit may be rejected; a cut last draft is never chosen."""


def select(attempts: list[Attempt], cfg: Config, key: Key = text) -> Selection:
    """One pair of each attempt whose last `agree` drafts have one key, and whose first draft has another.

    Dropped: 'too few drafts', 'cut' (either of the two), 'no answer' (an empty key), 'disagree', 'tied' (the
    first draft gives the same answer).
    """
    return collect(attempts, lambda attempt: _choose(attempt, cfg, key))


def _choose(attempt: Attempt, cfg: Config, key: Key) -> list[Pair] | str:
    if len(attempt.drafts) <= cfg.agree:
        return "too few drafts"
    first, *last = attempt.drafts[0], *attempt.drafts[-cfg.agree :]
    if not last[-1].complete or not (first.complete or cfg.reject_cut):
        return "cut"
    keys = {key(attempt.prompt, draft.text) for draft in last}
    if "" in keys:
        return "no answer"
    if len(keys) > 1:
        return "disagree"
    return "tied" if key(attempt.prompt, first.text) in keys else [pair(attempt, last[-1], first)]
