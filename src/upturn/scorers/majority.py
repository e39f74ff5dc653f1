"""Majority vote: answers count as good if the model mostly gives them, so that no label is needed (arXiv:2505.21444).

Votes are counted over answers that can be read, of the attempt itself or of the same prompt in `voters`, such as the
drafts of a frozen earlier model. a* is the most frequent answer, the first of equally frequent ones; m is its share.

hard    value = 1 where the draft's answer is a*, else 0
soft    value = share of the draft's answer; 0 where it cannot be read
tau     where m < tau, or no answer can be read, the prompt is unlabelled: every value is NaN

`right` is still the task's verdict, for measuring only. Rules that ask what is right would learn from the labels.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from pydantic import Field

from upturn._model import Strict
from upturn.errors import DataError
from upturn.scorers._base import grade
from upturn.tasks._base import Task
from upturn.types import Attempt, Score

RIGHT_IS_GOLD = True
"""Whether `right` is the verifier's word beside this scorer's own: for measuring, and not to be learnt from."""
BY_OTHERS = True
"""Whether a draft is judged by the other drafts of its attempt, so that its score says something of them too."""


class Config(Strict):
    """What a vote is worth."""

    soft: bool = False
    """Whether each answer is worth its share of the votes, instead of 1 for the winner and 0 for all others."""
    tau: float = Field(default=0.0, ge=0, le=1)
    """Share of the votes that the winner needs."""


def load(cfg: Config) -> Majority:
    """The scorer; it holds no state."""
    return Majority(cfg)


class Majority:
    """Asks the task what each final answer is, and counts."""

    def __init__(self, cfg: Config) -> None:
        self.cfg = cfg

    def score(self, task: Task, attempts: list[Attempt], voters: Sequence[Attempt] | None = None) -> list[Attempt]:
        """One score for each draft; a prompt that `voters` lacks is a `DataError`."""
        elsewhere = None if voters is None else {attempt.prompt.id: attempt for attempt in voters}
        return [self._scored(task, attempt, _voter(attempt, elsewhere)) for attempt in attempts]

    def _scored(self, task: Task, attempt: Attempt, voter: Attempt) -> Attempt:
        verdicts = _verdicts(task, attempt)
        cast = verdicts if voter is attempt else _verdicts(task, voter)
        entitled = zip(voter.drafts, cast, strict=True)
        votes = Counter(verdict.answer for draft, verdict in entitled if draft.kind == "answer" and verdict.answer)
        unlabelled = (replace(verdict, critique="") for verdict in verdicts)  # a critique would tell the label
        return replace(attempt, scores=tuple(self._score(verdict, votes) for verdict in unlabelled))

    def _score(self, verdict: Score, votes: Counter[str]) -> Score:
        if not votes:
            return replace(verdict, value=math.nan, note="unlabelled: no vote can be read")
        [(winner, count)] = votes.most_common(1)  # of equally frequent ones, the first seen
        said = f"{count} of {votes.total()} votes for {winner!r}"
        if count / votes.total() < self.cfg.tau:
            return replace(verdict, value=math.nan, note=f"unlabelled: only {said}")
        value = votes[verdict.answer] / votes.total() if self.cfg.soft else float(verdict.answer == winner)
        return replace(verdict, value=value, note=said)


def _voter(attempt: Attempt, elsewhere: dict[str, Attempt] | None) -> Attempt:
    if elsewhere is None:
        return attempt
    if attempt.prompt.id not in elsewhere:
        raise DataError(
            f"majority vote, prompt {attempt.prompt.id}",
            "The voters have no answers to it.",
            "Let the voters answer the same prompts, or leave them out so that the drafts vote themselves.",
        )
    return elsewhere[attempt.prompt.id]


def _verdicts(task: Task, attempt: Attempt) -> list[Score]:
    return [grade(task, attempt.prompt, draft.text) for draft in attempt.drafts]
