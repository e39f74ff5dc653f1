"""What a perfect chooser, the training scorer, or a vote would make of the same model's answers."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile
from statistics import fmean

from upturn.evaluation import stats, values
from upturn.evaluation.controls import can_vote, num_parallel
from upturn.evaluation.stats import Estimate
from upturn.evaluation.study import Ceilings, PassAt
from upturn.evaluation.turns import pass_chance, right_of, scores_of, vote
from upturn.types import Attempt


def ceilings(
    chain: Sequence[Attempt], parallel: Sequence[Attempt], rewards: Sequence[Attempt] | None = None, seed: int = 0
) -> Ceilings | None:
    """`rewards`: the parallel attempts as the training scorer judged them, None where that is the verifier.

    None where there are no parallel answers.
    """
    if not num_parallel(parallel):
        return None
    gap = _verification_gap(parallel, parallel if rewards is None else rewards, seed)
    room = 1 - fmean(values.per_prompt(parallel, values.mean_right).values() or [1.0])
    found = [pass_at(parallel, k, seed) for k in _sizes(num_parallel(parallel))]
    return Ceilings(
        pass_at=tuple(row for row in found if row),
        verification_gap=gap,
        relative_gap=gap.value / room if gap and room > 0 else None,
        refinement_gap=_refinement_gap(chain, parallel, seed),
    )


def pass_at(parallel: Sequence[Attempt], k: int, seed: int = 0) -> PassAt | None:
    """pass@k with its interval; None where no prompt has k drafts that could be judged.

    Raises ValueError where an attempt has fewer than k drafts.
    """
    chances = values.per_prompt(parallel, lambda attempt: pass_chance(attempt, k))
    return PassAt(k=k, share=stats.mean(list(chances.values()), seed)) if chances else None


def _sizes(largest: int) -> list[int]:
    """1, 2, 4, ... and the largest."""
    return [*takewhile(lambda k: k < largest, (2**power for power in range(64))), largest]


def _verification_gap(parallel: Sequence[Attempt], rewards: Sequence[Attempt], seed: int) -> Estimate | None:
    places = {attempt.prompt.id: values.best(scores_of(attempt)) for attempt in rewards}
    judged = [attempt for attempt in parallel if attempt.prompt.id in places]
    chosen = values.per_prompt(judged, lambda attempt: right_of(scores_of(attempt)[places[attempt.prompt.id]]))
    differences = values.minus(chosen, values.per_prompt(judged, values.mean_right))
    return stats.mean(differences, seed) if differences else None


def _refinement_gap(chain: Sequence[Attempt], parallel: Sequence[Attempt], seed: int) -> Estimate | None:
    """The vote is of as many answers as the chain's model was asked for, which may be more than it has turns."""
    k = values.num_answers(chain)
    if not can_vote(parallel) or num_parallel(parallel) < k:
        return None
    votes = values.per_prompt(parallel, lambda attempt: vote(scores_of(attempt)[:k]))
    differences = values.minus(values.per_prompt(chain, values.last_right), votes)
    return stats.mean(differences, seed) if differences else None
