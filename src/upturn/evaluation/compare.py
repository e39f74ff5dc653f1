"""Several arms on the same prompts: who is better at the first turn, at the last, by refining, and at equal tokens.

Every comparison is paired by prompt. Arms of several seeds are resampled over seeds and prompts: in pairs where both
arms have the same seeds, else each arm its own. Two single runs are tested by McNemar where answers are right or wrong,
everything else by the bootstrap; Holm's correction covers all contrasts of the comparison. How far few seeds can be
trusted stands in docs/measures.md.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import combinations, pairwise
from math import nan
from statistics import fmean
from typing import Literal, NamedTuple, get_args

import numpy as np

from upturn._model import Strict
from upturn.errors import RunError
from upturn.evaluation import stats, values
from upturn.evaluation.controls import can_vote
from upturn.evaluation.stats import Estimate
from upturn.evaluation.summary import Label
from upturn.evaluation.turns import right_of, scores_of, vote
from upturn.types import Attempt

What = Literal["first turn", "last turn", "gain", "last turn at equal tokens"]


class Run(NamedTuple):
    """One run of an arm."""

    seed: int
    label: str
    """Which of its models."""
    chain: Sequence[Attempt]
    parallel: Sequence[Attempt] | None = None


Arm = tuple[str, Sequence[Run]]


class ArmRow(Strict):
    """One arm: what its runs reach, each run weighing the same."""

    name: str
    seeds: tuple[int, ...]
    labels: tuple[Label, ...]
    """The compared model of each run."""
    turns: int
    """The most turns of its chains."""
    first: Estimate
    """Accuracy of the first turn."""
    last: Estimate
    """Accuracy of the last turn."""
    gain: Estimate
    """Last turn minus first turn, in shares."""
    tokens: float
    """Generated tokens per prompt, all turns together."""
    vote: Estimate | None
    """Accuracy of the vote of as many direct answers as the model was asked for in a chain, proposals among them; null
    where a run has fewer, or answers cannot vote."""


class Contrast(Strict):
    """One difference between two arms on the same prompts."""

    before: str
    """Name of the arm that is subtracted."""
    after: str
    """Name of the arm that it is subtracted from."""
    what: What
    difference: Estimate
    """`after` minus `before`, in shares."""
    tokens: float | None
    """The token budget per prompt of both arms, the smaller of their chains'; null where tokens are not made equal. An
    arm without a token, whose endpoint told none, has no contrast at equal tokens."""
    p_value: float
    test: Literal["McNemar", "bootstrap"]
    p_holm: float
    """Corrected for all contrasts of the comparison."""
    at_most: bool
    """Whether both p are upper ends: no resample lay on the far side of 0, and the bootstrap tells no smaller p."""


class Comparison(Strict):
    """Arms, and every difference between two of them."""

    n: int
    """Prompts, the same for all arms."""
    arms: tuple[ArmRow, ...]
    contrasts: tuple[Contrast, ...]


def compare(arms: Mapping[str, Sequence[Run]], seed: int = 0, against: str | None = None) -> Comparison:
    """Every pair of arms, the earlier one subtracted from the later; with `against`, only the pairs with that arm.

    An arm's prompts are those of all its runs, since the problems of some tasks depend on the seed. Raises RunError
    where there is one arm only, an arm has no runs, a run no attempts or none whose ends a verifier judged, or two arms
    have other prompts. An answer that could not be judged is left out.
    """
    arms = {name: sorted(runs, key=lambda run: run.seed) for name, runs in arms.items()}
    prompts = _prompts(arms)
    rows = [_arm(name, runs, prompts, seed) for name, runs in arms.items()]
    pairs = [(against, name) for name in arms if name != against] if against else list(combinations(arms, 2))
    num_resamples = stats.resamples_for(len(get_args(What)) * len(pairs))
    found = [
        contrast
        for before, after in pairs
        for contrast in _contrasts((before, arms[before]), (after, arms[after]), prompts, seed, num_resamples)
    ]
    adjusted = stats.holm([contrast.p_value for contrast in found])
    contrasts = [c.model_copy(update={"p_holm": p}) for c, p in zip(found, adjusted, strict=True)]
    return Comparison(n=len(prompts), arms=tuple(rows), contrasts=tuple(contrasts))


def _prompts(arms: Mapping[str, Sequence[Run]]) -> list[str]:
    """The ids that all arms share, in the order of the first."""
    if len(arms) < 2:
        what = f"There is only one arm, {next(iter(arms))}." if arms else "There is no arm."
        raise RunError("comparison", what, "Name two runs or more, or another arm with --arm NAME=RUN,RUN.")
    texts = {name: {a.prompt.id: a.prompt.text for run in runs for a in run.chain} for name, runs in arms.items()}
    for name, runs in arms.items():
        if not runs or not all(run.chain for run in runs):
            raise RunError(f"arm {name}", "It has a run without attempts, or no run.", "Measure it, or leave it out.")
        if not all(values.per_prompt(run.chain, values.gained) for run in runs):
            raise RunError(f"arm {name}", "No verifier judged its answers.", "Compare runs of a task with a verifier.")
    first, *others = texts
    for other in others:
        same = sum(texts[first].get(prompt) == text for prompt, text in texts[other].items())
        if not same == len(texts[first]) == len(texts[other]):
            sizes = f"{same} prompts are the same, of {len(texts[first])} of {first} and {len(texts[other])} of {other}"
            mend = "Measure both on the same task with the same seed of the task and the same number of prompts."
            raise RunError(f"arms {first} and {other}", f"They cannot be paired: {sizes}.", mend)
    return list(texts[first])


def _arm(name: str, runs: Sequence[Run], prompts: Sequence[str], seed: int) -> ArmRow:
    return ArmRow(
        name=name,
        seeds=tuple(run.seed for run in runs),
        labels=tuple(run.label for run in runs),
        turns=_turns(runs),
        first=_share(runs, prompts, values.first_right, seed),
        last=_share(runs, prompts, values.last_right, seed),
        gain=stats.mean(_table(runs, prompts, values.gained), seed),
        tokens=_tokens_by_turn(runs)[-1],
        vote=_vote(runs, prompts, max(values.num_answers(run.chain) for run in runs), seed),
    )


def _vote(runs: Sequence[Run], prompts: Sequence[str], k: int, seed: int) -> Estimate | None:
    voters = [Run(run.seed, run.label, run.parallel or ()) for run in runs]
    enough = all(run.chain and min(len(a.drafts) for a in run.chain) >= k for run in voters)
    if not enough or not all(can_vote(run.chain) for run in voters):
        return None
    return _share(voters, prompts, lambda attempt: vote(scores_of(attempt)[:k]), seed)


def _share(runs: Sequence[Run], prompts: Sequence[str], number: values.Number, seed: int) -> Estimate:
    """By Wilson for a single run, else by the bootstrap."""
    if len(runs) == 1:
        return stats.share([number(attempt) for attempt in runs[0].chain])
    return stats.mean(_table(runs, prompts, number), seed)


def _contrasts(before: Arm, after: Arm, prompts: Sequence[str], seed: int, num_resamples: int) -> Iterator[Contrast]:
    """`p_holm` is filled in once the whole family is known."""
    budget = min(_tokens_by_turn(runs)[-1] for _, runs in (before, after))
    numbers: dict[What, tuple[values.Number, values.Number]] = {
        "first turn": (values.first_right, values.first_right),
        "last turn": (values.last_right, values.last_right),
        "gain": (values.gained, values.gained),
    }
    at_budget = [_right_at(_tokens_by_turn(runs), budget) for _, runs in (before, after)]
    if budget and at_budget[0] and at_budget[1]:
        numbers["last turn at equal tokens"] = (at_budget[0], at_budget[1])
    paired = _pairs(before[1]) == _pairs(after[1])
    many = seed, num_resamples
    for what, (number, other) in numbers.items():
        first, last = _table(before[1], prompts, number), _table(after[1], prompts, other)
        if not np.isfinite(last - first if paired else np.vstack([first, last])).any(axis=1).all():
            continue  # answers that could not be judged left no prompt to both
        difference, p_value = stats.mean_and_p(last - first, *many) if paired else stats.difference(first, last, *many)
        exact = what in ("first turn", "last turn") and len(first) == len(last) == 1
        p_value = _mcnemar(first[0], last[0]) if exact else p_value
        yield Contrast(
            before=before[0],
            after=after[0],
            what=what,
            difference=difference,
            tokens=budget if what == "last turn at equal tokens" else None,
            p_value=p_value,
            test="McNemar" if exact else "bootstrap",
            p_holm=p_value,
            at_most=not exact and p_value <= stats.least_p(num_resamples),
        )


def _pairs(runs: Sequence[Run]) -> list[tuple[int, set[str]]]:
    """What two runs must have in common to be compared as a pair: the seed and the prompts."""
    return [(run.seed, {attempt.prompt.id for attempt in run.chain}) for run in runs]


def _mcnemar(first_P: stats.Floats, last_P: stats.Floats) -> float:
    return stats.mcnemar(int(np.sum(last_P > first_P)), int(np.sum(last_P < first_P)))


def _table(runs: Sequence[Run], prompts: Sequence[str], number: values.Number) -> stats.Floats:
    """(R, P) with NaN where a run lacks a prompt."""
    rows = [values.per_prompt(run.chain, number) for run in runs]
    return np.array([[row.get(prompt, nan) for prompt in prompts] for row in rows])


def _right_at(tokens: Sequence[float], budget: float) -> values.Number | None:
    """Whether a chain is right at the budget, linear between the two turns around it; None below the first turn."""
    if budget >= tokens[-1]:
        return values.last_right
    for turn, (low, high) in enumerate(pairwise(tokens), start=1):
        if low <= budget < high:
            return partial(_between, turn, (budget - low) / (high - low))
    return None


def _between(turn: int, weight: float, attempt: Attempt) -> float:
    """Right at this turn and at the next, weighted."""
    first, last = (right_of(values.at_turn(attempt, one)) for one in (turn, turn + 1))
    return (1 - weight) * first + weight * last


def _tokens_by_turn(runs: Sequence[Run]) -> list[float]:
    """Generated tokens per prompt up to each turn, mean over runs."""
    return [fmean(_tokens(run.chain, turn) for run in runs) for turn in range(1, _turns(runs) + 1)]


def _tokens(chain: Sequence[Attempt], turn: int) -> float:
    return fmean(sum(d.num_tokens for d in attempt.drafts if d.turn <= turn) for attempt in chain)


def _turns(runs: Sequence[Run]) -> int:
    return max(draft.turn for run in runs for attempt in run.chain for draft in attempt.drafts)
