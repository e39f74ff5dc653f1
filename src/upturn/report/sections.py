"""The panels of a page as data: what each says, draws and lists. A panel without data is None and left out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from upturn.evaluation.study import Method, ModelStudy, Study
from upturn.report import curves, flow, model_tables, run_tables, turn_tables
from upturn.report.drawing import Drawing
from upturn.report.formats import percent
from upturn.report.tables import Table
from upturn.report.trends import drift_panels, loss_panels, trends


@dataclass(frozen=True, slots=True)
class Key:
    """One entry of a legend."""

    mark: str
    colour: str
    """CSS variable, without dashes."""
    text: str


@dataclass(frozen=True, slots=True)
class More:
    """Tables that open on demand."""

    title: str
    tables: tuple[Table, ...]


@dataclass(frozen=True, slots=True)
class Section:
    """One panel."""

    id: str
    title: str
    lead: str
    drawing: Drawing | None = None
    keys: tuple[Key, ...] = ()
    tables: tuple[Table, ...] = ()
    more: tuple[More, ...] = ()


Losses = Sequence[tuple[str, Sequence[float]]]
"""(label, the loss of each optimizer step) per training."""


def of_run(study: Study, losses: Losses) -> list[Section]:
    """All panels of a run that have data, the main figure first."""
    if not study.models:
        found = [training(study, losses), stages(study)]
    elif not study.models[-1].judged:
        found = [unjudged(study.models), drift(study.models), training(study, losses), stages(study)]
    else:
        models = study.models
        found = [
            turns(models),
            transitions(models),
            tests(models),
            cost(models),
            ceilings(models),
            drift(models),
            training(study, losses),
            stages(study),
        ]
    return [section for section in found if section]


def ends(models: Sequence[ModelStudy]) -> list[ModelStudy]:
    """The last model and the one that it is compared with, where they differ."""
    last = models[-1]
    base = next((model for model in models if model.label == last.base), models[0])
    return [base, last] if base is not last else [last]


def turns(models: Sequence[ModelStudy]) -> Section:
    """The main figure."""
    lead = (
        "Share of right answers on held-out prompts, turn by turn. A line that rises means that the model improves its"
        f" own answers. Bands are 95% intervals;{' faint lines are the other models;' if models[1:] else ''} under each"
        " name stands what the last turn adds to the first, in points."
    )
    more = [turn_tables.controls(models), turn_tables.progress(models), turn_tables.every_turn(models)]
    return Section(
        "turns",
        "Turn by turn",
        lead,
        curves.turn_panels(models),
        _control_keys(models[-1]),
        (turn_tables.turn_table(models),),
        tuple(More(table.title, (table,)) for table in more if table),
    )


def unjudged(models: Sequence[ModelStudy]) -> Section:
    """In place of the main figure where nobody knows what is right."""
    lead = (
        "No verifier judged these answers, so nobody knows how many are right. Only the reward says how turns compare:"
        " its means stand below as those of the training scorer, where there is one."
    )
    return Section("turns", "Turn by turn", lead, tables=(turn_tables.every_turn(models),))


_MARKS: dict[Method, str] = {"majority": "◇", "best of n": "△", "resample": "✕"}


def _control_keys(model: ModelStudy) -> tuple[Key, ...]:
    """What the marks beside the curves are, with the numbers of the last model."""
    names: dict[Method, str] = {
        "majority": "vote of direct answers",
        "best of n": "best direct answer by the scorer",
        "resample": "fresh answer instead of a refinement",
    }
    keys = tuple(
        Key(_MARKS[control.method], curves.CONTROLS[control.method][0], names[control.method] + _price(control.price))
        for control in curves.equal_tokens(model)
    )
    refine = [point for point in model.costs if point.method == "refine"][-1:]
    told = f"refining, {refine[0].tokens:.0f} tokens per prompt; at as many tokens:" if refine and keys else "refining"
    return (Key("●", "accent", told), *keys)


def _price(price: float) -> str:
    return "" if price == 1 else f" ({100 * price:.0f}% of them)"


def transitions(models: Sequence[ModelStudy]) -> Section | None:
    """Who was fixed and who was broken."""
    shown = [model for model in ends(models) if len(model.turns) > 1 and model.paths]
    if not shown:
        return None
    last, others = shown[-1], [model for model in models[:-1] if model.revisions]
    lead = (
        "Each column is a turn: right answers above, wrong ones below. Ribbons are prompts; the strong ones change"
        " sides. Refining pays when it fixes more than it breaks."
    )
    keys = (Key("■", "right", "right, or fixed"), Key("■", "wrong", "wrong, or broken"))
    more = [More("All paths and revisions of the other models", tuple(_both(others)))] if others else []
    return Section(
        "transitions", "Fixed and broken", lead, flow.flow_panels(shown), keys, tuple(_both([last])), tuple(more)
    )


def _both(models: Sequence[ModelStudy]) -> list[Table]:
    return [table for model in models for table in (turn_tables.paths(model), turn_tables.revisions(model))]


def tests(models: Sequence[ModelStudy]) -> Section | None:
    """Whether the flips are more than chance."""
    tested = [model for model in models if model.tests]
    if not tested:
        return None
    lead = (
        "McNemar's exact test asks how likely flips as uneven as these are if both directions were equally likely."
        " Holm's correction allows for looking at every pair of turns. A gain below the detectable difference can"
        " easily stay unseen with so many prompts."
    )
    more = [More("The other models", tuple(turn_tables.tests(model) for model in tested[:-1]))] if tested[1:] else []
    return Section("tests", "More than chance?", lead, tables=(turn_tables.tests(tested[-1]),), more=tuple(more))


def cost(models: Sequence[ModelStudy]) -> Section | None:
    """Accuracy at a price."""
    shown = [model for model in ends(models) if len(model.costs) > 1]
    if not shown:
        return None
    known = any(point.tokens for model in shown for point in model.costs)
    lead = (
        "The same tokens can buy several direct answers instead: a vote, the best of them by the scorer, or just the"
        " last one. Refining is worth its price where its line is above theirs."
        if known
        else "How many tokens these answers took is unknown, since the endpoint does not tell it: nothing can be"
        " compared at equal tokens."
    )
    priced = [model for model in models if model.costs]
    return Section(
        "cost",
        "What the tokens buy",
        lead,
        curves.cost_panels(shown) if known else None,
        tables=(model_tables.stops(shown[-1]),) if shown[-1].stops else (),
        more=(
            More("Every way to use answers, all models", tuple(model_tables.costs(model) for model in priced)),
            *_stops_of(priced[:-1]),
        ),
    )


def _stops_of(models: Sequence[ModelStudy]) -> list[More]:
    tables = tuple(model_tables.stops(model) for model in models if model.stops)
    return [More("When to stop, the other models", tables)] if tables else []


def ceilings(models: Sequence[ModelStudy]) -> Section | None:
    """What a perfect chooser would make of the same drafts."""
    shown = [model for model in models if model.ceilings]
    if not shown:
        return None
    lead = (
        "pass@k is the chance that k direct answers hold a right one: what a perfect chooser would reach. Where it"
        " falls from model to model, training has made the answers narrower."
    )
    drawing = curves.pass_curves(shown) if any(len(m.ceilings.pass_at) > 1 for m in shown if m.ceilings) else None
    return Section(
        "ceilings", "Ceilings", lead, drawing, tables=(model_tables.ceilings(shown), model_tables.pass_at(shown))
    )


def drift(models: Sequence[ModelStudy]) -> Section | None:
    """How far the models have moved."""
    if not trends(models):
        return None
    lead = (
        "What else training changed, from the model before training to the last one. Answers that grow longer, more"
        " alike or less certain are a price that accuracy does not show."
    )
    table = model_tables.drift(models)
    if len(models) == 1:
        return Section("drift", "What the answers are like", "Measured on direct answers.", tables=(table,))
    return Section("drift", "Drift", lead, drift_panels(models), more=(More("The numbers of the figure", (table,)),))


def training(study: Study, losses: Losses) -> Section | None:
    """What was trained on."""
    if not study.training:
        return None
    pairs = sum(row.pairs for row in study.training)
    precise = sorted(row.label_precision for row in study.training if row.label_precision is not None)
    lead = f"{pairs:,} pairs, or groups of drafts of one prompt, in all."
    if precise:
        span = " to ".join(dict.fromkeys(percent(value) for value in (precise[0], precise[-1])))
        lead += (
            " A pair is precise when its chosen draft is right and its rejected one wrong, by the verifier:"
            f" {span} of them are. Where the chosen draft is the earlier one, the chain had made the answer worse."
        )
    return Section(
        "pairs",
        "Pairs and training",
        lead,
        loss_panels(losses) if losses else None,
        tables=(run_tables.pairs(study.training), run_tables.optimisation(study.training)),
        more=(More("More numbers of the last steps", (run_tables.last_steps(study.training),)),)
        if any(row.metrics for row in study.training)
        else (),
    )


def stages(study: Study) -> Section | None:
    """What the run cost."""
    if not study.stages:
        return None
    lead = "Wall time of each step when it was really done, also where a later run read it back."
    return Section(
        "stages",
        "What the run took",
        lead,
        tables=(run_tables.kinds_of_stage(study.stages),),
        more=(
            More(
                "The only step" if len(study.stages) == 1 else f"All {len(study.stages)} steps",
                (run_tables.stages(study.stages),),
            ),
        ),
    )
