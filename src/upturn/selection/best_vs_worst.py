"""The best draft by score against a worse one, with hard or soft labels; ties make no pair."""

from __future__ import annotations

import math
import random
from typing import Literal

from pydantic import Field

from upturn._model import Strict
from upturn.selection._base import Key, Selection, collect, distinct, pair, same, text
from upturn.types import Attempt, Draft, Pair


class Config(Strict):
    """Which drafts make a pair."""

    rejected: Literal["worst", "nearest", "random"] = "worst"
    """Which worse draft is rejected: of lowest score, of highest score, or any (seeded by prompt id)."""
    pairs_per_prompt: int = Field(default=1, ge=1)
    """The best draft against so many worse ones with distinct texts, in the order of `rejected`."""
    margin: float = Field(default=0.0, ge=0)
    """The least difference between the two scores; it is above 0 in any case."""
    min_chosen: float | None = None
    """The least score of a chosen draft; 1 asks for a right answer by a verifier."""
    labels: Literal["hard", "soft"] = "hard"
    """soft: p = sigmoid(score of the chosen - score of the rejected), in the scorer's units."""
    reject_cut: bool = False
    """Whether a draft cut by the length limit may be rejected; it is never chosen."""


def select(attempts: list[Attempt], cfg: Config, key: Key = text) -> Selection:
    """Up to `pairs_per_prompt` pairs of each scored attempt. Of equally good drafts the earliest is chosen.

    Dropped: 'no score', 'cut' (none is complete), 'low' (below `min_chosen`), 'one draft', 'tied', 'margin',
    'same text', and 'no further draft' for slots beyond the first.
    """
    return collect(attempts, lambda attempt: _choose(attempt, cfg), cfg.pairs_per_prompt)


def _choose(attempt: Attempt, cfg: Config) -> list[Pair] | str:
    value = {d.index: s.value for d, s in zip(attempt.drafts, attempt.scores, strict=True)}
    scored = [draft for draft in attempt.drafts if not math.isnan(value[draft.index])]
    complete = [draft for draft in scored if draft.complete]
    if not complete:
        return "cut" if scored else "no score"
    best = max(complete, key=lambda draft: value[draft.index])
    if cfg.min_chosen is not None and value[best.index] < cfg.min_chosen:
        return "low"
    rivals = [draft for draft in (scored if cfg.reject_cut else complete) if draft is not best]
    gap = {draft.index: value[best.index] - value[draft.index] for draft in rivals}
    if not rivals:
        return "one draft"
    worse = [draft for draft in rivals if gap[draft.index] > 0]
    if not worse:
        return "tied"
    far = [draft for draft in worse if gap[draft.index] >= cfg.margin]
    if not far:
        return "margin"
    ordered = distinct(_ordered(far, gap, cfg, attempt.prompt.id))
    other = [draft for draft in ordered if not same(draft, best)]
    pairs = [
        pair(attempt, best, draft, _sigmoid(gap[draft.index]) if cfg.labels == "soft" else 1.0)
        for draft in other[: cfg.pairs_per_prompt]
    ]
    return pairs or "same text"


def _ordered(worse: list[Draft], gap: dict[int, float], cfg: Config, prompt_id: str) -> list[Draft]:
    if cfg.rejected == "random":
        return random.Random(prompt_id).sample(worse, len(worse))
    return sorted(worse, key=lambda draft: gap[draft.index], reverse=cfg.rejected == "worst")


def _sigmoid(gap: float) -> float:
    return 1 / (1 + math.exp(-gap))
