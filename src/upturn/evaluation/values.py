"""One number per prompt, so that models, turns and controls meet on the same prompts."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from math import isnan, nan
from statistics import fmean

from upturn.evaluation.turns import answers_of, at_turn, right_of, scores_of
from upturn.types import Attempt, Score

Number = Callable[[Attempt], float]
"""NaN where an attempt has none: an answer that could not be judged is neither right nor wrong."""

Values = dict[str, float]
"""By prompt id."""


def per_prompt(attempts: Sequence[Attempt], number: Number) -> Values:
    """The number of each attempt; the mean where a prompt has several attempts. Prompts without one are left out."""
    found: defaultdict[str, list[float]] = defaultdict(list)
    for attempt in attempts:
        if not isnan(value := number(attempt)):
            found[attempt.prompt.id].append(value)
    return {prompt: fmean(numbers) for prompt, numbers in found.items()}


def minus(after: Values, before: Values) -> list[float]:
    """Differences at the prompts that both have."""
    return [after[prompt] - before[prompt] for prompt in after if prompt in before]


def shared(attempts: Sequence[Attempt], others: Sequence[Attempt]) -> list[Attempt]:
    """The attempts at prompts that the others have too: an endpoint need not answer all of either."""
    prompts = {attempt.prompt.id for attempt in others}
    return [attempt for attempt in attempts if attempt.prompt.id in prompts]


def num_answers(chain: Sequence[Attempt]) -> int:
    """The most answers that the model was asked for at one prompt, proposals among them and kept answers not: as many
    direct answers are what a chain is compared with."""
    asked = ([draft for draft in attempt.drafts if draft.kind == "answer" and not draft.kept] for attempt in chain)
    return max(map(len, asked), default=0)


def first_right(attempt: Attempt) -> float:
    """1 where the first turn is right."""
    return right_of(at_turn(attempt, 1))


def last(attempt: Attempt) -> Score:
    """The answer of the last turn."""
    answers = answers_of(attempt)
    return answers[max(answers)]


def last_right(attempt: Attempt) -> float:
    """1 where the last turn is right."""
    return right_of(last(attempt))


def gained(attempt: Attempt) -> float:
    """1 where the last turn is right and the first is wrong, -1 the other way, else 0."""
    return last_right(attempt) - first_right(attempt)


def mean_right(attempt: Attempt) -> float:
    """Share of right drafts among those that could be judged; NaN where none could."""
    known = [score.right for score in scores_of(attempt) if not isnan(score.value)]
    return fmean(known) if known else nan


def best(rewards: Sequence[Score]) -> int:
    """The place of the highest value, the first among equals; without a judgement (NaN) a draft is never preferred."""
    values = [float("-inf") if isnan(score.value) else score.value for score in rewards]
    return values.index(max(values))
