"""The task's own verifier."""

from __future__ import annotations

from dataclasses import replace

from upturn._model import Strict
from upturn.scorers._base import Scorer, grade
from upturn.tasks._base import Task
from upturn.types import Attempt


class Config(Strict):
    """There is nothing to set."""


def load(cfg: Config) -> Scorer:
    """The scorer; it holds no state."""
    return Exact()


class Exact:
    """Asks the task."""

    def score(self, task: Task, attempts: list[Attempt]) -> list[Attempt]:
        """Each draft's grade. A verifier that raises is a `DataError`."""
        return [
            replace(attempt, scores=tuple(grade(task, attempt.prompt, draft.text) for draft in attempt.drafts))
            for attempt in attempts
        ]
