"""The tables about whole models: price, when to stop, ceilings and drift."""

from __future__ import annotations

from collections.abc import Sequence

from upturn.evaluation.study import ModelStudy, PassAt, StopRule
from upturn.report.curves import NAMES
from upturn.report.tables import (
    DASH,
    Cell,
    Column,
    Table,
    columns,
    count,
    decimal,
    difference,
    estimated,
    head,
    rests_on,
    share,
    tokens,
    without_empty,
    words,
)


def costs(model: ModelStudy) -> Table:
    """Every point of the cost curve."""
    heads = columns("method", "k | turns or answers", "right", "tokens | per prompt", "context tokens | per prompt")
    rows = tuple(
        (
            head(NAMES[point.method]),
            count(point.k),
            estimated(point.accuracy),
            tokens(point.tokens),
            tokens(point.prompt_tokens),
        )
        for point in model.costs
    )
    note = rests_on(point.accuracy for point in model.costs)
    return without_empty(Table(f"Accuracy and tokens, {model.label}", heads, rows, note))


def stops(model: ModelStudy) -> Table:
    """When to stop refining, and what it gives."""
    heads = columns(Column("rule", kind="words"), "turns | taken, mean", "tokens | per prompt", "right")
    rows = tuple(
        (words(_rule(rule)), decimal(rule.mean_turns, 2), tokens(rule.tokens), estimated(rule.accuracy))
        for rule in model.stops
    )
    note = rests_on(rule.accuracy for rule in model.stops)
    return without_empty(Table(f"When to stop, {model.label}", heads, rows, note))


def _rule(rule: StopRule) -> str:
    most = f", at most {rule.turns} turns"
    match rule.name:
        case "fixed":
            return f"after {rule.turns} turn{'s' if rule.turns > 1 else ''}"
        case "unchanged":
            return f"when a draft repeats the one before{most}"
        case "agreement":
            return f"when the final answer repeats{most}"
        case "oracle":
            return f"when it is right, which only the verifier knows{most}"


def ceilings(models: Sequence[ModelStudy]) -> Table:
    """The gaps that a chooser, or refining, leaves or closes."""
    heads = columns(
        "model", "choosing | best of n by the scorer against the mean", "choosing | of the room above",
        "refining | last turn against a vote of as many",
    )  # fmt: skip
    known = [(model.label, model.ceilings) for model in models if model.ceilings]
    rows = tuple(
        (head(label), difference(gaps.verification_gap), share(gaps.relative_gap), difference(gaps.refinement_gap))
        for label, gaps in known
    )
    note = rests_on(gap for _, gaps in known for gap in (gaps.verification_gap, gaps.refinement_gap))
    return without_empty(Table("Gaps, in points", heads, rows, note))


def pass_at(models: Sequence[ModelStudy]) -> Table:
    """pass@k."""
    known = [(model, {point.k: point for point in model.ceilings.pass_at}) for model in models if model.ceilings]
    ks = sorted({k for _, points in known for k in points})
    rows = tuple((head(model.label), *(_pass(points.get(k)) for k in ks)) for model, points in known)
    note = rests_on(point.share for _, points in known for point in points.values())
    return Table("pass@k of direct answers", columns("model", *(f"k = {k}" for k in ks)), rows, note)


def _pass(point: PassAt | None) -> Cell:
    return estimated(point.share if point else None)


def drift(models: Sequence[ModelStudy]) -> Table:
    """How far each model has moved."""
    heads = columns(
        "model", "KL to start | nats per token", "KL to previous | nats per token", "length | first turn, tokens",
        "length | last turn", "distinct | 1-grams", "distinct | 2-grams", "distinct | 3-grams",
        "entropy | nats per token", "identical | pairs of answers", "pass@k", "training scorer | first turn",
        "training scorer | last turn",
    )  # fmt: skip
    rows = []
    for model in models:
        d = model.drift
        large = d.pass_large and Cell(estimated(d.pass_large.share).text, f"k = {d.pass_large.k}")
        rows.append(
            (
                head(model.label),
                decimal(d.kl_start),
                decimal(d.kl_previous),
                tokens(d.length),
                tokens(d.length_last),
                *(share(value) for value in d.distinct),
                decimal(d.entropy),
                share(d.identical),
                large or DASH,
                decimal(d.reward_first),
                decimal(d.reward),
            )
        )
    prompts = rests_on([row for model in models for row in model.turns[:1]]).split(".")[0]
    note = f"{prompts}. Over direct answers unless said otherwise; no intervals."
    return without_empty(Table("Drift", heads, tuple(rows), note))
