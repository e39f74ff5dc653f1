"""What every scorer offers: a judgement of all drafts of all prompts, one score for each draft, in order."""

from __future__ import annotations

from dataclasses import replace
from typing import Protocol

from upturn.errors import DataError, UpturnError
from upturn.tasks._base import Task
from upturn.types import Attempt, Prompt, Score


class Scorer(Protocol):
    """Judges drafts.

    A scorer file holds `Config` (a strict, frozen pydantic model) and `load(config) -> Scorer`; one that looks at the
    other drafts of an attempt says so by `BY_OTHERS = True`.
    """

    def score(self, task: Task, attempts: list[Attempt]) -> list[Attempt]:
        """The same attempts with `scores` filled, one for each draft; NaN where no judgement was possible."""
        ...


def grade(task: Task, prompt: Prompt, answer: str) -> Score:
    """The task's verdict, with the final answer; a verifier that raises is a `DataError` that names the prompt."""
    try:
        return replace(task.grade(prompt, answer), answer=task.vote_key(prompt, answer))
    except UpturnError:
        raise
    except Exception as error:
        raise DataError(
            f"verifier of {type(task).__name__}, prompt {prompt.id}",
            f"It raised {type(error).__name__}: {error}",
            "Mend the verifier so that it judges any text, or leave this prompt out.",
        ) from error
