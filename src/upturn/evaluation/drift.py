"""How far a model has moved, and what it lost on the way: divergence, length, diversity, coverage, reward."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from math import comb, isnan
from statistics import fmean

from upturn.evaluation import values, words
from upturn.evaluation.ceilings import pass_at
from upturn.evaluation.controls import num_parallel
from upturn.evaluation.study import Drift
from upturn.types import Attempt, Draft, Score


def drift(
    chain: Sequence[Attempt],
    parallel: Sequence[Attempt] = (),
    kl_start: float | None = None,
    kl_previous: float | None = None,
    rewards: Sequence[Attempt] | None = None,
    seed: int = 0,
) -> Drift:
    """`rewards`: the chains as the training scorer judged them, None where that is the verifier."""
    direct = [draft for attempt in (*chain, *parallel) for draft in attempt.drafts if draft.turn == 1]
    texts = [draft.text for draft in direct]
    return Drift(
        kl_start=kl_start,
        kl_previous=kl_previous,
        length=fmean(draft.num_tokens for draft in direct),
        length_last=fmean(map(_last_length, chain)),
        distinct=tuple(words.distinct(texts, n) for n in (1, 2, 3)),
        entropy=_entropy(direct),
        identical=identical(parallel),
        pass_large=pass_at(parallel, num_parallel(parallel), seed) if num_parallel(parallel) else None,
        reward=_mean_value([values.last(attempt) for attempt in rewards or ()]),
        reward_first=_mean_value([values.at_turn(attempt, 1) for attempt in rewards or ()]),
    )


def identical(parallel: Sequence[Attempt]) -> float | None:
    """Mean over prompts of the share of pairs of drafts with the same text; None where no prompt has a pair."""
    shares = [_same_pairs(attempt.drafts) for attempt in parallel if len(attempt.drafts) > 1]
    return fmean(shares) if shares else None


def _last_length(attempt: Attempt) -> int:
    """Tokens of the answer of the last turn: without those of the critique before it, and of a kept answer those that
    it once took."""
    last = max(attempt.drafts, key=lambda draft: draft.turn)
    while last.kept and last.parents:
        last = attempt.drafts[last.parents[-1]]
    return len(last.token_ids) or last.num_tokens - last.critique_tokens


def _same_pairs(drafts: Sequence[Draft]) -> float:
    counts = Counter(draft.text for draft in drafts).values()
    return sum(comb(count, 2) for count in counts) / comb(len(drafts), 2)


def _entropy(drafts: Sequence[Draft]) -> float | None:
    logprobs = [logprob for draft in drafts for logprob in draft.sampler_logprobs]
    return -fmean(logprobs) if logprobs else None


def _mean_value(scores: Sequence[Score]) -> float | None:
    judged = [score.value for score in scores if not isnan(score.value)]
    return fmean(judged) if judged else None
