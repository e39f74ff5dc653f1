"""What rules that give groups share: the usable scores of an attempt, and a group from the drafts that learn."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

from upturn.types import Attempt, Draft, Group, Score


def judged(attempt: Attempt) -> dict[int, Score]:
    """The scores by index of their drafts, without those whose value is no finite number."""
    scored = zip(attempt.drafts, attempt.scores, strict=True)
    return {draft.index: score for draft, score in scored if math.isfinite(score.value)}


def group(attempt: Attempt, values: Mapping[int, float]) -> Group:
    """The attempt with a value for each index that learns; all other drafts are only shown."""
    return Group(attempt, tuple(values.get(draft.index) for draft in attempt.drafts))


def distinct(drafts: Iterable[Draft]) -> list[Draft]:
    """The first draft of each text."""
    first: dict[str, Draft] = {}
    for draft in drafts:
        first.setdefault(draft.text.strip(), draft)
    return list(first.values())
