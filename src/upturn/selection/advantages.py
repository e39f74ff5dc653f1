"""Advantages for policy gradients: what each draft earned, less what the drafts of the same turn earned.

Reward      own          s, the draft's score
            last         s of the last draft of its chain
            sum          s summed over its chain
            improvement  s - s', where s' is the score of the draft it refines; s at turn 1
            shaped       s + shaping (s - s'); s at turn 1 (SCoRe, arXiv:2409.12917)
Estimator   rloo         r_i - mean of all other r_j                                (RLOO, arXiv:2402.14740)
            grpo         (r_i - mean) / (std + 1e-4), std with n - 1                (GRPO, arXiv:2402.03300)
                         r_i - mean, with scale=false                               (Dr. GRPO, arXiv:2503.20783)
            reinforce    r_i
Chains      A draft refines the last draft that it was shown. A chain is a draft that no other was shown, and all
            drafts that it goes back to: a path, where each draft was shown one other. A draft of several chains, such
            as the first of a star, takes the mean over them.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from statistics import fmean, stdev
from typing import Annotated, Literal

from pydantic import Field

from upturn._model import Strict
from upturn.selection._base import Key, Selection, collect, group, judged, text
from upturn.types import Attempt, Draft, Group

EPSILON = 1e-4
"""Added to the standard deviation, as in TRL."""


class Config(Strict):
    """What earns, and what it is compared with."""

    reward: Literal["own", "last", "sum", "improvement", "shaped"] = "own"
    """What a draft earns, out of the scores of its chain."""
    shaping: float = Field(default=10.0, ge=0)
    """Weight of the change from the draft before (`shaped` only)."""
    estimator: Literal["rloo", "grpo", "reinforce"] = "rloo"
    """What is taken off the reward."""
    scale: bool = True
    """Whether advantages are divided by the standard deviation (`grpo` only)."""
    turns: tuple[Annotated[int, Field(ge=1)], ...] | None = None
    """Turns that learn from the reward. Drafts of others have value 0, so that only a KL term holds them: turn 2 alone
    is stage I of SCoRe. All turns where null."""


def select(attempts: list[Attempt], cfg: Config, key: Key = text) -> Selection:
    """A group of each scored attempt. A draft whose reward rests on a missing score is only shown.

    A cut draft learns like any other: it has no end token, so it is not taught as complete, and leaving it out would
    bias the gradient towards short drafts. One that found no room to begin has nothing to learn, and is only shown.

    Dropped: 'no score', 'one draft' (no turn has two to compare), 'tied' (all advantages are 0).
    """
    chosen = collect(attempts, lambda attempt: _choose(attempt, cfg))
    return replace(chosen, set_aside={why: count for why, count in chosen.set_aside.items() if why != "cut"})


def _choose(attempt: Attempt, cfg: Config) -> list[Group] | str:
    rewards = _rewards(attempt, cfg)
    if not rewards:
        return "no score"
    turns: dict[int, list[int]] = defaultdict(list)
    for draft in attempt.drafts:
        if draft.index in rewards:
            turns[draft.turn].append(draft.index)
    values = dict.fromkeys(rewards, 0.0)
    learning = [rivals for turn, rivals in turns.items() if cfg.turns is None or turn in cfg.turns]
    for rivals in learning:
        values |= zip(rivals, _advantages([rewards[index] for index in rivals], cfg), strict=True)
    if any(values.values()):
        return [group(attempt, values)]
    alone = cfg.estimator != "reinforce" and all(len(rivals) < 2 for rivals in learning)
    return "one draft" if alone else "tied"


def _rewards(attempt: Attempt, cfg: Config) -> dict[int, float]:
    """What each judged draft earned, by index; without those whose reward rests on a missing score, and those of no
    token at all."""
    scores = {index: score.value for index, score in judged(attempt).items()}
    value = defaultdict(lambda: math.nan, scores)
    if cfg.reward in ("last", "sum"):
        earned = _over_chains(attempt.drafts, value, cfg)
    else:
        earned = {draft.index: _over_step(draft, value, cfg) for draft in attempt.drafts}
    begun = {draft.index for draft in attempt.drafts if draft.complete or draft.token_ids}
    return {index: earned[index] for index in scores if index in begun and not math.isnan(earned[index])}


def _over_step(draft: Draft, value: Mapping[int, float], cfg: Config) -> float:
    own = value[draft.index]
    if cfg.reward == "own" or not draft.parents:
        return own
    change = own - value[draft.parents[-1]]
    return change if cfg.reward == "improvement" else own + cfg.shaping * change


def _over_chains(drafts: Sequence[Draft], value: Mapping[int, float], cfg: Config) -> dict[int, float]:
    """The mean over a draft's chains of their last score or of their sum; chains with a missing score do not count."""
    chain: dict[int, set[int]] = {}
    for draft in sorted(drafts, key=lambda draft: draft.index):
        chain[draft.index] = {draft.index}.union(*(chain[parent] for parent in draft.parents))
    ends = chain.keys() - {parent for draft in drafts for parent in draft.parents}
    worth = {e: value[e] if cfg.reward == "last" else math.fsum(value[i] for i in chain[e]) for e in sorted(ends)}
    found = {index: [w for end, w in worth.items() if index in chain[end] and not math.isnan(w)] for index in chain}
    return {index: fmean(worths) if worths else math.nan for index, worths in found.items()}


def _advantages(rewards: list[float], cfg: Config) -> list[float]:
    """The advantages of drafts that are compared with each other; 0 where none is better, to the last bit."""
    if cfg.estimator == "reinforce":
        return rewards
    if len(set(rewards)) < 2:
        return [0.0] * len(rewards)
    if cfg.estimator == "rloo":
        total, others = math.fsum(rewards), len(rewards) - 1
        return [reward - (total - reward) / others for reward in rewards]
    mean, scale = fmean(rewards), stdev(rewards) + EPSILON if cfg.scale else 1.0
    return [(reward - mean) / scale for reward in rewards]
