"""Right drafts as desirable, wrong ones as undesirable, and a stranger's answer beside them (KTO, arXiv:2402.01306).

Value +1 is desirable and -1 undesirable. Value 0 is an answer to another prompt, as if it had been given to this one:
KTO estimates from it how far the policy has moved from its reference.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import count

from pydantic import Field

from upturn._model import Strict
from upturn.selection._base import Key, Selection, collect, distinct, group, judged, text
from upturn.types import Attempt, Draft, Group, Score


class Config(Strict):
    """Which drafts are learnt."""

    cap: int = Field(default=1, ge=1)
    """At most so many of each kind and prompt, with distinct texts, in the order they were sampled. One of each is as
    much as a pair."""
    both: bool = True
    """Whether a prompt must have both kinds."""
    reject_cut: bool = False
    """Whether a draft cut by the length limit may be undesirable; it is never desirable."""


def uses_right(cfg: Config) -> bool:
    """Always."""
    return True


def select(attempts: list[Attempt], cfg: Config, key: Key = text) -> Selection:
    """A group of each scored attempt, with the first complete draft of the next attempt at another prompt.

    The list is a ring. Where no other prompt has a complete draft, there is no stranger.

    Dropped: 'no score', 'all right', 'all wrong' (both only where `both` is asked for), 'cut'.
    """
    places = count()
    return collect(attempts, lambda attempt: _choose(attempt, attempts, next(places), cfg))


def _choose(attempt: Attempt, attempts: Sequence[Attempt], place: int, cfg: Config) -> list[Group] | str:
    scores = judged(attempt)
    if not scores:
        return "no score"
    drafts = [draft for draft in attempt.drafts if draft.index in scores]
    right = [draft for draft in drafts if scores[draft.index].right]
    wrong = [draft for draft in drafts if not scores[draft.index].right]
    if cfg.both and not (right and wrong):
        return "all right" if right else "all wrong"
    good = distinct(draft for draft in right if draft.complete)[: cfg.cap]
    bad = distinct(draft for draft in wrong if draft.complete or cfg.reject_cut)[: cfg.cap]
    if not (good and bad if cfg.both else good or bad):
        return "cut"
    values = {draft.index: 1.0 for draft in good} | {draft.index: -1.0 for draft in bad}
    stranger = _stranger(attempts, place)
    return [group(attempt, values) if stranger is None else _beside(group(attempt, values), stranger)]


def _stranger(attempts: Sequence[Attempt], place: int) -> Draft | None:
    """The first complete draft that answers another prompt, from the next attempt on."""
    after = (attempts[(place + step) % len(attempts)] for step in range(1, len(attempts)))
    others = (attempt for attempt in after if attempt.prompt.id != attempts[place].prompt.id)
    return next((draft for attempt in others for draft in attempt.drafts if draft.complete), None)


def _beside(known: Group, stranger: Draft) -> Group:
    """The group with one more draft, shown nothing, of value 0."""
    attempt = known.attempt
    index = 1 + max(draft.index for draft in attempt.drafts)
    foreign = replace(stranger, index=index, turn=1, parents=(), request="", critique="")
    drafts = (*attempt.drafts, foreign)
    scores = (*attempt.scores, Score(math.nan, False, "answers another prompt"))
    return Group(replace(attempt, drafts=drafts, scores=scores), (*known.values, 0.0))
