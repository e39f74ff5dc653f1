"""Right drafts, to be learnt by NLL: rejection sampling (STaR, ReST-EM, Think-Prune-Train, arXiv:2504.18116).

Each is learnt in the context in which it was sampled, so a right refinement is learnt as a refinement.
STaR (arXiv:2203.14465) and Think-Prune-Train keep 1 of each prompt, ReST-EM (arXiv:2312.06585) at most 10.
"""

from __future__ import annotations

from pydantic import Field

from upturn._model import Strict
from upturn.selection._base import Key, Selection, collect, distinct, group, judged, text
from upturn.types import Attempt, Group


class Config(Strict):
    """Which drafts are kept."""

    right_only: bool = True
    """False keeps wrong drafts too: what learning from oneself does without a verifier."""
    cap: int = Field(default=1, ge=1)
    """At most so many of each prompt, in the order they were sampled."""
    unique: bool = True
    """Whether a text is kept once only."""


def uses_right(cfg: Config) -> bool:
    """Where only right drafts are kept."""
    return cfg.right_only


def select(attempts: list[Attempt], cfg: Config, key: Key = text) -> Selection:
    """A group of each scored attempt with a right draft: value 1 for drafts that are kept. Cut drafts never are.

    Dropped: 'no score', 'none right', 'cut' (all right ones).
    """
    return collect(attempts, lambda attempt: _choose(attempt, cfg))


def _choose(attempt: Attempt, cfg: Config) -> list[Group] | str:
    scores = judged(attempt)
    if not scores:
        return "no score"
    right = [
        draft for draft in attempt.drafts if draft.index in scores and (scores[draft.index].right or not cfg.right_only)
    ]
    if not right:
        return "none right"
    complete = [draft for draft in right if draft.complete]
    if not complete:
        return "cut"
    kept = (distinct(complete) if cfg.unique else complete)[: cfg.cap]
    return [group(attempt, {draft.index: 1.0 for draft in kept})]
