"""The arms of a comparison as curves: accuracy and tokens by turn, each run of an arm weighing the same."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import nan
from statistics import fmean

from upturn.evaluation import stats, values
from upturn.evaluation.compare import Run
from upturn.evaluation.stats import Estimate
from upturn.types import Attempt


@dataclass(frozen=True, slots=True)
class ArmCurve:
    """One arm."""

    name: str
    accuracy: tuple[Estimate, ...]
    """At each turn; a chain that ended early keeps its last answer."""
    tokens: tuple[float, ...]
    """Generated tokens per prompt up to each turn."""
    fixed: Estimate
    """Share of all prompts that are wrong at the first turn and right at the last."""
    broken: Estimate
    """Share of all prompts that are right at the first turn and wrong at the last."""


def curves(arms: Mapping[str, Sequence[Run]], seed: int = 0) -> list[ArmCurve]:
    """One curve per arm, in order."""
    return [_curve(name, runs, seed) for name, runs in arms.items()]


def _curve(name: str, runs: Sequence[Run], seed: int) -> ArmCurve:
    last = max(draft.turn for run in runs for attempt in run.chain for draft in attempt.drafts)
    turns = range(1, last + 1)
    return ArmCurve(
        name,
        tuple(_share(runs, partial(_right_at, turn), seed) for turn in turns),
        tuple(fmean(_tokens(run.chain, turn) for run in runs) for turn in turns),
        _share(runs, lambda attempt: float(values.gained(attempt) > 0), seed),
        _share(runs, lambda attempt: float(values.gained(attempt) < 0), seed),
    )


def _right_at(turn: int, attempt: Attempt) -> float:
    return values.right_of(values.at_turn(attempt, turn))


def _tokens(chain: Sequence[Attempt], turn: int) -> float:
    return fmean(sum(draft.num_tokens for draft in attempt.drafts if draft.turn <= turn) for attempt in chain)


def _share(runs: Sequence[Run], number: values.Number, seed: int) -> Estimate:
    """By Wilson for a single run, else by the bootstrap over seeds and prompts."""
    if len(runs) == 1:
        return stats.share([number(attempt) for attempt in runs[0].chain])
    rows = [values.per_prompt(run.chain, number) for run in runs]
    prompts = dict.fromkeys(prompt for row in rows for prompt in row)
    return stats.mean([[row.get(prompt, nan) for prompt in prompts] for row in rows], seed)
