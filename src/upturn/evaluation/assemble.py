"""From scored attempts to a `Study`: every measure of one model, and of a run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from upturn.errors import RunError
from upturn.evaluation import stats, values
from upturn.evaluation.advice import advice
from upturn.evaluation.ceilings import ceilings
from upturn.evaluation.controls import as_gain, cost_points, excess, num_parallel, resample
from upturn.evaluation.drift import drift
from upturn.evaluation.revisions import corrected, paths, revisions
from upturn.evaluation.stats import Estimate
from upturn.evaluation.stopping import stops
from upturn.evaluation.study import ModelStudy, PassAt, Progress, Study
from upturn.evaluation.summary import Measurement, Summary, TrainingRow
from upturn.evaluation.turns import Gain, gain, judged, pass_chance, transitions, turn_table
from upturn.evaluation.verdicts import verdict
from upturn.types import Attempt


@dataclass(frozen=True, slots=True)
class Measured:
    """All scored attempts of one model."""

    label: str
    iteration: int
    chain: Sequence[Attempt]
    """One draft per turn, judged by the verifier."""
    parallel: Sequence[Attempt] = ()
    """Direct answers for the controls, judged by the verifier; none where they were not sampled."""
    chain_rewards: Sequence[Attempt] | None = None
    """The chains as the training scorer judged them; None where that is the verifier."""
    parallel_rewards: Sequence[Attempt] | None = None
    """The same of the parallel answers."""
    rewarded_alone: bool = False
    """Whether the training scorer judged each draft without a look at the others."""
    upstream: str = ""
    """The model whose answers it corrected; '' where it refined its own."""
    kl_start: float | None = None
    kl_previous: float | None = None


def study(summary: Summary, measured: Sequence[Measured]) -> Study:
    """A run as it is shown: its models in the order they were measured, the first one being the base.

    Behind several upstream models each of them has a base of its own: turn 1 is theirs, and to compare it across them
    would tell which of them is better.
    """
    rows = {row.label: row for row in summary.measurements}
    known = [_told(one, rows[one.label]) if one.label in rows else one for one in measured]
    models: list[ModelStudy] = []
    for place, one in enumerate(known):
        earlier = [other for other in known[:place] if other.upstream == one.upstream]
        models.append(model_study(one, *((earlier[0], earlier[-1]) if earlier else (None, None)), summary.seed))
    training = summary.training if not models or models[-1].judged else _without_precision(summary.training)
    return Study(
        name=summary.name,
        recipe=summary.recipe,
        model=summary.model,
        task=summary.task,
        seed=summary.seed,
        status=summary.status,
        models=tuple(models),
        training=training,
        stages=summary.stages,
        advice=advice(models, training) if training else None,
        verdict=verdict(models),
    )


def _told(measured: Measured, row: Measurement) -> Measured:
    """With what only the summary tells."""
    return replace(measured, upstream=row.upstream, rewarded_alone=row.rewarded_alone)


def model_study(
    model: Measured, base: Measured | None = None, before: Measured | None = None, seed: int = 0
) -> ModelStudy:
    """Every measure of one model; `base` is the model before training, `before` the one measured before.

    Controls and comparisons rest on the prompts that both sides have; tables of turns on all of the chains. Raises
    RunError where nothing was measured.
    """
    if not model.chain:
        raise RunError(f"measurement of {model.label}", "It has no attempts.", "Measure it on one prompt or more.")
    flips, turns = transitions(model.chain), turn_table(model.chain)
    ends = turns[0].turn, turns[-1].turn
    chain, parallel = model.chain, values.shared(model.parallel, model.chain)
    both = values.shared(chain, parallel) if parallel else chain
    direct_gain, direct_p = _direct_gain(model, base, seed) if base else (None, None)
    found = ModelStudy(
        label=model.label,
        iteration=model.iteration,
        n=len({attempt.prompt.id for attempt in chain}),
        judged=judged(chain),
        turns=tuple(turns),
        gain=gain(chain, *ends, seed) if ends in {(flip.first, flip.last) for flip in flips} else None,
        direct_gain=direct_gain,
        direct_p=direct_p,
        base=base.label if base else None,
        tests=corrected(flips),
        revisions=revisions(chain),
        paths=paths(chain),
        costs=cost_points(both, parallel, model.parallel_rewards, rewarded_alone=model.rewarded_alone),
        stops=stops(chain),
        ceilings=ceilings(both, parallel, model.parallel_rewards, seed),
        control=resample(both, parallel, seed),
        excess=excess(both, parallel, seed),
        drift=drift(chain, parallel, model.kl_start, model.kl_previous, model.chain_rewards, seed),
        progress=progress(model, before, seed) if before else None,
    )
    return found if found.judged else _unjudged(found)


def _unjudged(model: ModelStudy) -> ModelStudy:
    """What is left without a verifier: texts, tokens and rewards, and nothing that asks what is right."""
    nothing = {"fixed": None, "broken": None, "copied_right": None, "copied_wrong": None}
    left: dict[str, object] = {
        "revisions": tuple(row.model_copy(update=nothing) for row in model.revisions),
        "drift": model.drift.model_copy(update={"pass_large": None}),
    }
    named = ("gain", "direct_gain", "direct_p", "ceilings", "control", "excess", "progress")
    return model.model_copy(update=left | dict.fromkeys(named) | {"tests": (), "paths": (), "costs": (), "stops": ()})


def _without_precision(training: Sequence[TrainingRow]) -> tuple[TrainingRow, ...]:
    """Summaries of earlier versions have a share of 0 where no verifier judged, which says nothing."""
    return tuple(row.model_copy(update={"label_precision": None}) for row in training)


def progress(model: Measured, before: Measured, seed: int = 0) -> Progress | None:
    """What a model gained over another on the same prompts; None where they share none."""
    first = _change(model.chain, before.chain, values.first_right, seed)
    last = _change(model.chain, before.chain, values.last_right, seed)
    gained = _change(model.chain, before.chain, values.gained, seed)
    if first is None or last is None or gained is None:
        return None
    reward = _change(model.chain_rewards or (), before.chain_rewards or (), lambda a: values.last(a).value, seed)
    large = _pass_change(model, before, seed)
    return Progress(before=before.label, direct=first, last=last, gain=gained, pass_large=large, reward=reward)


def _pass_change(model: Measured, before: Measured, seed: int) -> PassAt | None:
    k = min(num_parallel(model.parallel), num_parallel(before.parallel))
    if not k:
        return None
    share = _change(model.parallel, before.parallel, lambda attempt: pass_chance(attempt, k), seed)
    return PassAt(k=k, share=share) if share else None


def _change(after: Sequence[Attempt], before: Sequence[Attempt], number: values.Number, seed: int) -> Estimate | None:
    differences = values.minus(values.per_prompt(after, number), values.per_prompt(before, number))
    return stats.mean(differences, seed) if differences else None


def _direct_gain(model: Measured, base: Measured, seed: int) -> tuple[Gain | None, float | None]:
    """With McNemar's p, which knows how few flips there may be: a bootstrap of few has too narrow an interval."""
    after, before = (values.per_prompt(one.chain, values.first_right) for one in (model, base))
    flips = values.minus(after, before)
    if not flips:
        return None, None
    p_value = stats.mcnemar(sum(flip > 0 for flip in flips), sum(flip < 0 for flip in flips))
    return as_gain(stats.mean(flips, seed), 1, 1), p_value
