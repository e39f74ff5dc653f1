"""Each draft's chance to beat the model's other drafts (SPPO, arXiv:2405.00675).

P_ij = sigmoid(scale (s_i - s_j)), and the value of draft i is the mean of P_ij over all j, itself (1/2) included.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Literal

from pydantic import Field

from upturn._model import Strict
from upturn.selection._base import Key, Selection, collect, group, judged, same, text
from upturn.types import Attempt, Draft, Group, Score


class Config(Strict):
    """How scores become win rates, and who learns from them."""

    scale: float = Field(default=1.0, gt=0)
    """By how much a unit of the scorer counts in the sigmoid."""
    keep: Literal["extremes", "all"] = "extremes"
    """extremes: the best and the worst draft learn, as in the paper."""


def select(attempts: list[Attempt], cfg: Config, key: Key = text) -> Selection:
    """A group of each scored attempt. Only drafts in one context are compared: the first in which they differ.

    A cut draft is compared, and does not learn.

    Dropped: 'no score', 'one draft' (in every context), 'tied', 'cut' (complete ones do not differ), 'same text'.
    """
    return collect(attempts, lambda attempt: _choose(attempt, cfg))


def _choose(attempt: Attempt, cfg: Config) -> list[Group] | str:
    scores = judged(attempt)
    if not scores:
        return "no score"
    contexts: dict[tuple[object, ...], list[Draft]] = defaultdict(list)
    for draft in attempt.drafts:
        if draft.index in scores:
            contexts[draft.parents, draft.request].append(draft)
    rivals = [drafts for drafts in contexts.values() if len(drafts) > 1]
    if not rivals:
        return "one draft"
    rates = [_rates(drafts, scores, cfg.scale) for drafts in rivals]
    if not any(_differ(rate) for rate in rates):
        return "tied"
    complete = {draft.index for draft in attempt.drafts if draft.complete}
    learning = [{i: value for i, value in rate.items() if i in complete} for rate in rates]
    values = next((rate for rate in learning if _differ(rate)), None)
    if values is None:
        return "cut"
    return _kept(attempt, values, cfg)


def _kept(attempt: Attempt, values: Mapping[int, float], cfg: Config) -> list[Group] | str:
    if cfg.keep == "all":
        return [group(attempt, values)]
    by_index = {draft.index: draft for draft in attempt.drafts}
    best, worst = (pick(values, key=values.__getitem__) for pick in (max, min))
    if same(by_index[best], by_index[worst]):
        return "same text"
    return [group(attempt, {index: values[index] for index in (best, worst)})]


def _rates(drafts: Sequence[Draft], scores: Mapping[int, Score], scale: float) -> dict[int, float]:
    """Win rate of each draft against all of them, by index."""
    value = {draft.index: scores[draft.index].value for draft in drafts}
    return {i: fmean(_sigmoid(scale * (mine - other)) for other in value.values()) for i, mine in value.items()}


def _differ(rate: Mapping[int, float]) -> bool:
    return len(set(rate.values())) > 1


def _sigmoid(gap: float) -> float:
    return (1 + math.tanh(gap / 2)) / 2  # never overflows
