"""Is another iteration likely to pay? The stopping advisor, by the rules of docs/measures.md.

The last turn of the last two measured models, on the same prompts, decides; warnings about what went wrong on the way
turn a doubt into a no and, where there are several, a yes into a doubt.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

from upturn.evaluation.phrases import between, percent, signed
from upturn.evaluation.stats import Estimate
from upturn.evaluation.study import Advice, ModelStudy, Progress
from upturn.evaluation.summary import TrainingRow

WORTH = 0.02
"""A gain of the last turn, as a share, that an iteration should be able to reach: two points."""
POWER = 2.8 / 1.96
"""The change found with 80 % power over the half width of its 95 % interval."""
MIN_PROMPTS = 30
"""Prompts below which the width of an interval does not say what would be found."""
ALIKE = 0.5
"""Share of identical pairs of direct answers from which there is little left to choose from."""
COLLAPSE = 0.5
"""Entropy over the entropy one model before, below which a model is said to collapse."""
RUNAWAY = 2.0
"""KL of this iteration over that of the one before, above which drift is said to run away."""
DRY = 0.5
"""Pairs of this iteration over those of the one before, below which pairs are said to run out."""
NOISY = 0.5
"""Label precision below which most pairs do not lead from wrong to right."""


def advice(models: Sequence[ModelStudy], training: Sequence[TrainingRow]) -> Advice | None:
    """From the last two measured models and trainings; None where nothing can be compared, or no verifier judged."""
    if len(models) < 2 or models[-1].progress is None:
        return None
    progress = models[-1].progress
    before = next((model for model in models[:-1] if model.label == progress.before), models[-2])
    warnings = [*_warnings_of_models(before, models[-1], progress), *_warnings_of_training(training)]
    hacked = list(_hacking(progress))
    reasons = [_last_turn(progress), _refinement(progress), *hacked, *warnings]
    return Advice(go_on=_decide(progress, len(warnings), bool(hacked)), reasons=tuple(reasons))


def _decide(progress: Progress, num_warnings: int, hacked: bool) -> Literal["yes", "no", "unclear"]:
    if hacked or progress.last.high < 0:
        return "no"
    if progress.last.low > 0:
        return "yes" if num_warnings < 2 else "unclear"
    return "no" if num_warnings or progress.last.high < WORTH else "unclear"


def _last_turn(progress: Progress) -> str:
    match _direction(progress.last):
        case 1:
            return f"The last turn improved: {_points(progress.last, progress)}."
        case -1:
            return f"The last turn got worse: {_points(progress.last, progress)}."
        case _:
            return f"The last turn hardly moved: {_points(progress.last, progress)}{_seen(progress.last)}."


def _seen(change: Estimate) -> str:
    """The change that four of five runs with so many prompts would show; '' where an interval cannot tell it."""
    least = 100 * POWER * (change.high - change.low) / 2
    if change.n < MIN_PROMPTS or not least:
        return ""
    return f"; with so many prompts a change of {least:.1f} points is seen four times in five"


def _refinement(progress: Progress) -> str:
    what = {1: "grew", -1: "shrank", 0: "did not clearly change"}[_direction(progress.gain)]
    return f"The gain by refining {what}: {_points(progress.gain, progress)}."


def _hacking(progress: Progress) -> Iterator[str]:
    reward, last = progress.reward, progress.last
    if reward and reward.low > 0 and last.low <= 0 and last.high <= WORTH:
        rates = f"{signed(reward.value, 2)} ({signed(reward.low, 2)} to {signed(reward.high, 2)})"
        left = f"by the verifier it gained {signed(100 * last.high)} points at most"
        yield f"The training scorer rates the last turn higher by {rates}; {left}: it is being gamed."


def _warnings_of_models(before: ModelStudy, last: ModelStudy, progress: Progress) -> Iterator[str]:
    large = progress.pass_large
    if large and large.share.high < 0:
        yield f"Coverage fell: pass@{large.k} {_points(large.share, progress)}."
    old, new = before.drift, last.drift
    if new.identical is not None and new.identical >= ALIKE:
        yield f"{percent(new.identical)} of pairs of direct answers are identical: little is left to choose from."
    if old.entropy and new.entropy is not None and new.entropy < COLLAPSE * old.entropy:
        yield f"Entropy collapsed: {new.entropy:.2f} nats per token after {old.entropy:.2f}."
    if old.kl_previous and new.kl_previous is not None and new.kl_previous > RUNAWAY * old.kl_previous:
        yield f"The model moved {new.kl_previous:.3f} nats per token, after {old.kl_previous:.3f} the time before."


def _warnings_of_training(training: Sequence[TrainingRow]) -> Iterator[str]:
    rows = [row for row in training if row.iteration]
    if len(rows) > 1 and rows[-1].pairs < DRY * rows[-2].pairs:
        yield f"Pairs are running out: {rows[-1].pairs:,} after {rows[-2].pairs:,}."
    precise = rows[-1].label_precision if rows else None
    if precise is not None and precise < NOISY:
        yield f"Only {percent(precise)} of the pairs have a right chosen and a wrong rejected draft."


def _direction(change: Estimate) -> int:
    return (change.low > 0) - (change.high < 0)


def _points(change: Estimate, progress: Progress) -> str:
    against = f"95% interval {between(change, 100)}, {change.n:,} prompts, against {progress.before}"
    return f"{signed(100 * change.value)} points ({against})"
