"""What refinements do to the drafts they are shown: tests of the flips, fixed and broken drafts, copies, paths."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from statistics import fmean

from upturn.evaluation import stats, words
from upturn.evaluation.study import Path, Revision, Tested
from upturn.evaluation.turns import Transition, answers_of, judged_of
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
    was_right = [step for step in steps if step[0][1].right]
    was_wrong = [step for step in steps if not step[0][1].right]
    return Revision(
        first=first,
        last=last,
        n=len(steps),
        fixed=stats.share([after.right for _, (_, after) in was_wrong]) if was_wrong else None,
        broken=stats.share([not after.right for _, (_, after) in was_right]) if was_right else None,
        copied=_copied(steps) or 0.0,
        copied_right=_copied(was_right),
        copied_wrong=_copied(was_wrong),
        edit_distance=fmean(words.edit_distance(old.text, new.text) for (old, _), (new, _) in steps),
    )


def _copied(steps: Sequence[Step]) -> float | None:
    return fmean(new.text == old.text for (old, _), (new, _) in steps) if steps else None


def paths(attempts: Sequence[Attempt]) -> tuple[Path, ...]:
    """How many prompts went each way through the turns: most frequent first, then by pattern."""
    patterns = ("".join("r" if score.right else "w" for score in answers_of(a).values()) for a in attempts)
    counted = sorted(Counter(patterns).items(), key=lambda item: (-item[1], item[0]))
    return tuple(Path(pattern=pattern, count=count) for pattern, count in counted)
