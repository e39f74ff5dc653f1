"""A right refinement against the very draft it was shown, where that one was wrong: what a repair looks like."""

from __future__ import annotations

import math

from pydantic import Field

from upturn._model import Strict
from upturn.selection._base import Key, Selection, collect, pair, same, text
from upturn.types import Attempt, Draft, Pair


class Config(Strict):
    """Which drafts make a pair."""

    pairs_per_prompt: int = Field(default=1, ge=1)
    """At most so many repairs with distinct texts, in the order they were sampled."""
    reject_cut: bool = False
    """Whether a draft cut by the length limit may be rejected; a cut repair is never chosen."""


def select(attempts: list[Attempt], cfg: Config, key: Key = text) -> Selection:
    """Up to `pairs_per_prompt` pairs of each scored attempt; the shown draft is the last one of the context.

    Dropped: 'no score', 'nothing refined', 'no repair' (no refinement is right where its draft was wrong), 'cut',
    'same text', and 'no further draft' for slots beyond the first.
    """
    return collect(attempts, lambda attempt: _choose(attempt, cfg), cfg.pairs_per_prompt)


def _choose(attempt: Attempt, cfg: Config) -> list[Pair] | str:
    judged = {d.index: s for d, s in zip(attempt.drafts, attempt.scores, strict=True) if not math.isnan(s.value)}
    if not judged:
        return "no score"
    by_index = {draft.index: draft for draft in attempt.drafts}
    steps = [
        (by_index[d.parents[-1]], d) for d in attempt.drafts if d.parents and {d.index, d.parents[-1]} <= set(judged)
    ]
    if not steps:
        return "nothing refined"
    repairs = [(shown, d) for shown, d in steps if judged[d.index].right and not judged[shown.index].right]
    if not repairs:
        return "no repair"
    whole = [(shown, d) for shown, d in repairs if d.complete and (shown.complete or cfg.reject_cut)]
    if not whole:
        return "cut"
    first: dict[str, tuple[Draft, Draft]] = {}
    for shown, repaired in whole:
        if not same(shown, repaired):
            first.setdefault(repaired.text.strip(), (shown, repaired))
    return [pair(attempt, d, shown) for shown, d in list(first.values())[: cfg.pairs_per_prompt]] or "same text"
