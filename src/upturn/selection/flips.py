"""Drafts that a refinement put right or spoilt: the right one of a draft and its refinement against the wrong one.

A repair shows what improving the very draft looks like, a damage what must not be done to a right one: in the `keep`
context the rejected answer is then the mistake that the model really makes.
"""

from __future__ import annotations

import math
from typing import Literal

from pydantic import Field

from upturn._model import Strict
from upturn.selection._base import Key, Selection, collect, pair, same, text
from upturn.types import Attempt, Draft, Pair


class Config(Strict):
    """Which drafts make a pair."""

    kinds: Literal["both", "repairs", "damages"] = "both"
    """Refinements that are right where the draft shown was wrong, the other way round, or both."""
    pairs_per_prompt: int = Field(default=1, ge=1)
    """At most so many, with distinct refinements, in the order they were sampled."""
    reject_cut: bool = False
    """Whether a draft cut by the length limit may be rejected; it is never chosen."""


def uses_right(cfg: Config) -> bool:
    """Always."""
    return True


def select(attempts: list[Attempt], cfg: Config, key: Key = text) -> Selection:
    """Up to `pairs_per_prompt` pairs of each scored attempt; the draft shown is the last one of the context.

    Dropped: 'no score', 'nothing refined', 'no flip' (of the wanted kinds), 'cut', 'same text', and 'no further
    draft' for slots beyond the first.
    """
    return collect(attempts, lambda attempt: _choose(attempt, cfg), cfg.pairs_per_prompt)


def _choose(attempt: Attempt, cfg: Config) -> list[Pair] | str:
    right = {d.index: s.right for d, s in zip(attempt.drafts, attempt.scores, strict=True) if not math.isnan(s.value)}
    if not right:
        return "no score"
    by_index = {draft.index: draft for draft in attempt.drafts if draft.index in right}
    steps = [(by_index[d.parents[-1]], d) for d in by_index.values() if d.parents and d.parents[-1] in by_index]
    if not steps:
        return "nothing refined"
    wanted = {"both": (True, False), "repairs": (True,), "damages": (False,)}[cfg.kinds]
    flips = [(shown, d) for shown, d in steps if right[shown.index] != right[d.index] and right[d.index] in wanted]
    if not flips:
        return "no flip"
    first: dict[str, tuple[Draft, Draft]] = {}
    for shown, refined in flips:
        chosen, rejected = (refined, shown) if right[refined.index] else (shown, refined)
        if chosen.complete and (rejected.complete or cfg.reject_cut):
            first.setdefault(refined.text.strip(), (chosen, rejected))
    if not first:
        return "cut"
    distinct = [(chosen, rejected) for chosen, rejected in first.values() if not same(chosen, rejected)]
    return [pair(attempt, *both) for both in distinct[: cfg.pairs_per_prompt]] or "same text"
