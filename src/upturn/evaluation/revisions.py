"""What refinements do to the drafts they are shown: tests of the flips, fixed and broken drafts, copies, paths."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from math import isnan
from statistics import fmean

from upturn.evaluation import stats, words
from upturn.evaluation.study import Path, Revision, Tested
from upturn.evaluation.turns import Transition, answers_of, judged_of, right_of
from upturn.types import Attempt, Draft, Score

Step = tuple[tuple[Draft, Score], tuple[Draft, Score]]
"""A prompt's answer before and after."""


def corrected(flips: Sequence[Transition]) -> tuple[Tested, ...]:
    """Holm's correction of McNemar's p-values over the family of these pairs of turns."""
    adjusted = stats.holm([row.p_value for row in flips])
    return tuple(Tested(flips=row, p_holm=p) for row, p in zip(flips, adjusted, strict=True))


def revisions(attempts: Sequence[Attempt]) -> tuple[Revision, ...]:
    """Neighbouring turns, then the first against the last; pairs that no prompt has are left out."""
    turns = sorted({draft.turn for attempt in attempts for draft in attempt.drafts})
    pairs = list(pairwise(turns)) + ([(turns[0], turns[-1])] if len(turns) > 2 else [])
    answers = [judged_of(attempt) for attempt in attempts]
    rows = ((a, b, [(answer[a], answer[b]) for answer in answers if a in answer and b in answer]) for a, b in pairs)
    return tuple(_revision(first, last, steps) for first, last, steps in rows if steps)


def _revision(first: int, last: int, steps: Sequence[Step]) -> Revision:
    was_right = [step for step in steps if right_of(step[0][1]) == 1]
    was_wrong = [step for step in steps if right_of(step[0][1]) == 0]
    fixed = stats.share([right_of(after) for _, (_, after) in was_wrong])
    broken = stats.share([1 - right_of(after) for _, (_, after) in was_right])
    return Revision(
        first=first,
        last=last,
        n=len(steps),
        fixed=fixed if fixed.n else None,
        broken=broken if broken.n else None,
        copied=_copied(steps) or 0.0,
        copied_right=_copied(was_right),
        copied_wrong=_copied(was_wrong),
        edit_distance=fmean(words.edit_distance(old.text, new.text) for (old, _), (new, _) in steps),
    )


def _copied(steps: Sequence[Step]) -> float | None:
    return fmean(new.text == old.text for (old, _), (new, _) in steps) if steps else None


def paths(attempts: Sequence[Attempt]) -> tuple[Path, ...]:
    """How many prompts went each way through the turns: most frequent first, then by pattern.

    A chain with an answer that could not be judged is left out; one that ended early has fewer letters.
    """
    known = [list(map(right_of, answers_of(attempt).values())) for attempt in attempts]
    patterns = ("".join("r" if right else "w" for right in rights) for rights in known if not any(map(isnan, rights)))
    counted = sorted(Counter(patterns).items(), key=lambda item: (-item[1], item[0]))
    return tuple(Path(pattern=pattern, count=count) for pattern, count in counted)
