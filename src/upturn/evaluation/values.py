"""One number per prompt, so that models, turns and controls meet on the same prompts."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from math import isnan
from statistics import fmean

from upturn.evaluation.turns import answers_of, scores_of
from upturn.types import Attempt, Score

Number = Callable[[Attempt], float]

Values = dict[str, float]
"""By prompt id."""


def per_prompt(attempts: Sequence[Attempt], number: Number) -> Values:
    """The number of each attempt; the mean where a prompt has several attempts."""
    found: defaultdict[str, list[float]] = defaultdict(list)
    for attempt in attempts:
        found[attempt.prompt.id].append(number(attempt))
    return {prompt: fmean(numbers) for prompt, numbers in found.items()}


def minus(after: Values, before: Values) -> list[float]:
    """Differences at the prompts that both have and whose numbers are numbers."""
    differences = [after[prompt] - before[prompt] for prompt in after if prompt in before]
    return [difference for difference in differences if not isnan(difference)]


def at_turn(attempt: Attempt, turn: int) -> Score:
    """The answer that stands at a turn: that turn's, or the last one of a chain that ended before."""
    answers = answers_of(attempt)
    if turn in answers:
        return answers[turn]
    return answers[max((t for t in answers if t <= turn), default=min(answers))]


def first_right(attempt: Attempt) -> float:
    """1 where the first turn is right."""
    return float(at_turn(attempt, 1).right)


def last(attempt: Attempt) -> Score:
    """The answer of the last turn."""
    answers = answers_of(attempt)
    return answers[max(answers)]


def last_right(attempt: Attempt) -> float:
    """1 where the last turn is right."""
    return float(last(attempt).right)


def gained(attempt: Attempt) -> float:
    """1 where the last turn is right and the first is wrong, -1 the other way, else 0."""
    return last_right(attempt) - first_right(attempt)


def mean_right(attempt: Attempt) -> float:
    """Share of right drafts."""
    return fmean(score.right for score in scores_of(attempt))


def best(rewards: Sequence[Score]) -> int:
    """The place of the highest value, the first among equals; without a judgement (NaN) a draft is never preferred."""
    values = [float("-inf") if isnan(score.value) else score.value for score in rewards]
    return values.index(max(values))
