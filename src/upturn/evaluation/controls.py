"""What else the same tokens would buy: votes, the best of n, fresh answers. And what refining gives beyond those.

Parallel direct answers serve every control: the k-th of them is what a chain of fresh answers would say at turn k.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from statistics import fmean

from upturn.evaluation import stats, values
from upturn.evaluation.stats import Estimate
from upturn.evaluation.study import CostPoint, Method
from upturn.evaluation.turns import Gain, right_of, scores_of, vote
from upturn.types import Attempt, Draft


def cost_points(
    chain: Sequence[Attempt],
    parallel: Sequence[Attempt] = (),
    rewards: Sequence[Attempt] | None = None,
    *,
    rewarded_alone: bool = False,
) -> tuple[CostPoint, ...]:
    """Accuracy at a price: each turn of the chain, then each number of parallel answers by every way to use them.

    `rewards` are the parallel attempts as the training scorer judged them, None where that is the verifier. Unless each
    draft was `rewarded_alone`, a reward may tell of answers that the first k do not hold, and the best is chosen of all
    only. A chain that ended early keeps its last answer.
    """
    last = max((draft.turn for attempt in chain for draft in attempt.drafts), default=0)
    points, n = [_turn(chain, turn) for turn in range(1, last + 1)], num_parallel(parallel)
    for method, right in _choices(parallel, rewards).items():
        least = 1 if method != "best of n" or rewarded_alone else max(n, 1)
        points += [_direct(parallel, method, right, k) for k in range(least, n + 1)]
    return tuple(points)


def num_parallel(parallel: Sequence[Attempt]) -> int:
    """Direct answers that every prompt has."""
    return min((len(attempt.drafts) for attempt in parallel), default=0)


def can_vote(attempts: Sequence[Attempt]) -> bool:
    """Whether any draft has a final answer; a task without final answers has no votes."""
    return any(score.answer for attempt in attempts for score in scores_of(attempt))


def at_equal_tokens(points: Sequence[CostPoint], tokens: float) -> Estimate | None:
    """The accuracy of one method at a number of generated tokens per prompt, linear between its points.

    The ends of the interval are interpolated too, which errs on the wide side: a mixture of two estimates has at most
    the mixture of their standard errors. None where the tokens lie outside of the points, or are 0: unknown, since an
    endpoint need not tell them.
    """
    if not tokens:
        return None
    exact = next((point.accuracy for point in points if point.tokens == tokens), None)
    for low, high in pairwise(sorted(points, key=lambda point: point.tokens)):
        if exact is None and low.tokens < tokens < high.tokens:
            return _between(low.accuracy, high.accuracy, (tokens - low.tokens) / (high.tokens - low.tokens))
    return exact


def resample(chain: Sequence[Attempt], parallel: Sequence[Attempt], seed: int = 0) -> Gain | None:
    """What fresh answers instead of refinements would give over the chain's first turn; None without common prompts.

    A chain of fresh answers ends as the mean direct answer does, whatever its length: the mean is taken, with less
    noise than any one of them.
    """
    direct, first = values.per_prompt(parallel, values.mean_right), values.per_prompt(chain, values.first_right)
    differences = values.minus(direct, first)
    if not differences:
        return None
    last = max(draft.turn for attempt in chain for draft in attempt.drafts)
    return as_gain(stats.mean(differences, seed), 1, last)


def excess(chain: Sequence[Attempt], parallel: Sequence[Attempt], seed: int = 0) -> Estimate | None:
    """Last turn of the chain minus the mean direct answer, paired by prompt; None without common prompts."""
    direct, last = values.per_prompt(parallel, values.mean_right), values.per_prompt(chain, values.last_right)
    differences = values.minus(last, direct)
    return stats.mean(differences, seed) if differences else None


def as_gain(change: Estimate, first: int, last: int) -> Gain:
    """A difference of shares in points."""
    points, low, high = (100 * end for end in (change.value, change.low, change.high))
    return Gain(first=first, last=last, n=change.n, points=points, low=low, high=high)


def _choices(
    parallel: Sequence[Attempt], rewards: Sequence[Attempt] | None
) -> dict[Method, Callable[[Attempt, int], float]]:
    """How k direct answers become one: whether that one is right, NaN where it could not be judged."""
    choices: dict[Method, Callable[[Attempt, int], float]] = {}
    if can_vote(parallel):
        choices["majority"] = lambda attempt, k: vote(scores_of(attempt)[:k])
    if rewards is not None:
        judged = {attempt.prompt.id: scores_of(attempt) for attempt in rewards}
        choices["best of n"] = lambda a, k: right_of(scores_of(a)[values.best(judged[a.prompt.id][:k])])
    choices["resample"] = lambda attempt, k: right_of(scores_of(attempt)[k - 1])
    return choices


def _turn(chain: Sequence[Attempt], turn: int) -> CostPoint:
    right = [right_of(values.at_turn(attempt, turn)) for attempt in chain]
    return _point("refine", turn, right, [[d for d in attempt.drafts if d.turn <= turn] for attempt in chain])


def _direct(parallel: Sequence[Attempt], method: Method, right: Callable[[Attempt, int], float], k: int) -> CostPoint:
    return _point(method, k, [right(attempt, k) for attempt in parallel], [a.drafts[:k] for a in parallel])


def _point(method: Method, k: int, right: Sequence[float], drafts: Sequence[Sequence[Draft]]) -> CostPoint:
    return CostPoint(
        method=method,
        k=k,
        accuracy=stats.share(right),
        tokens=fmean(sum(draft.num_tokens for draft in made) for made in drafts),
        prompt_tokens=fmean(sum(draft.prompt_tokens for draft in made) for made in drafts),
    )


def _between(low: Estimate, high: Estimate, weight: float) -> Estimate:
    ends = {name: (1 - weight) * getattr(low, name) + weight * getattr(high, name) for name in ("value", "low", "high")}
    return high.model_copy(update=ends)
