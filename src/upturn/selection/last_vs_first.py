"""The last draft against the first, without any score (rule-based selection of EVOLVE, arXiv:2502.05605)."""

from __future__ import annotations

from upturn._model import Strict
from upturn.selection._base import Key, Selection, collect, pair, same, text
from upturn.types import Attempt, Pair


class Config(Strict):
    """Which drafts make a pair."""

    reject_cut: bool = False
    """Whether a first draft cut by the length limit may be rejected; a cut last draft is never chosen."""


def select(attempts: list[Attempt], cfg: Config, key: Key = text) -> Selection:
    """One pair of each attempt. On flat chains the labels are noise: see `label_precision`.

    Dropped: 'one draft', 'cut' (either of the two), 'same text'.
    """
    return collect(attempts, lambda attempt: _choose(attempt, cfg))


def _choose(attempt: Attempt, cfg: Config) -> list[Pair] | str:
    if len(attempt.drafts) < 2:
        return "one draft"
    first, last = attempt.drafts[0], attempt.drafts[-1]
    if not last.complete or not (first.complete or cfg.reject_cut):
        return "cut"
    return "same text" if same(last, first) else [pair(attempt, last, first)]
