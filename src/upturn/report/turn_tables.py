"""The tables about turns: accuracy, gains, controls, paths, revisions and tests."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from upturn.evaluation.stats import Estimate
from upturn.evaluation.study import CostPoint, Method, ModelStudy, Revision, Tested
from upturn.report.curves import CONTROLS, NAMES, Control, equal_tokens
from upturn.report.formats import between, signed, tone
from upturn.report.tables import (
    DASH,
    Cell,
    Column,
    Table,
    basis,
    columns,
    count,
    decimal,
    difference,
    estimated,
    gained,
    head,
    p,
    rests_on,
    share,
    turn,
    with_bars,
    without_empty,
    words,
)

MOST_PATHS = 16
"""Paths listed one by one; the others are summed up in the last row."""


def turn_table(models: Sequence[ModelStudy]) -> Table:
    """One row per model: gains, and the accuracy of every turn."""
    turns = sorted({row.turn for model in models for row in model.turns})
    heads = columns(
        "model", "gain | last turn against first", "net gain | last turn against mean fresh answer",
        "first turn | against before training", *(f"turn {number}" for number in turns),
    )  # fmt: skip
    rows = []
    for model in models:
        by_turn = {row.turn: row for row in model.turns}
        gains = (gained(model.gain), difference(model.excess), gained(model.direct_gain))
        rows.append((head(model.label), *gains, *(turn(by_turn.get(number)) for number in turns)))
    numbers = [number for model in models for number in (model.gain, model.excess, model.direct_gain, *model.turns)]
    note = f"{rests_on(numbers)} The first columns are points, paired: the same prompts on both sides."
    strong = frozenset({len(rows) - 1} if rows[1:] else ())
    return without_empty(Table("Accuracy by turn", heads, tuple(rows), note, strong))


def controls(models: Sequence[ModelStudy]) -> Table | None:
    """The marks beside the curves; None where no model has any."""
    found = [(model, {control.method: control for control in equal_tokens(model)}) for model in models]
    methods: list[Method] = [method for method in CONTROLS if any(method in row for _, row in found)]
    if not methods:
        return None
    heads = columns(
        "model", "tokens | of the chain, per prompt", "last turn", *(Column(NAMES[method]) for method in methods),
        "fresh answers | mean against turn 1, points",
    )  # fmt: skip
    rows = tuple(
        (
            head(model.label),
            decimal(_chain(model).tokens, 1),
            estimated(_chain(model).accuracy),
            *(_priced(controls.get(method)) for method in methods),
            gained(model.control),
        )
        for model, controls in found
    )
    note = rests_on([*(control.accuracy for _, row in found for control in row.values()), *(m.control for m in models)])
    return without_empty(Table("At the tokens of the whole chain", heads, rows, note))


def _chain(model: ModelStudy) -> CostPoint:
    return [point for point in model.costs if point.method == "refine"][-1]


def _priced(control: Control | None) -> Cell:
    if control is None:
        return DASH
    cell = estimated(control.accuracy)
    return cell if control.price == 1 else replace(cell, range=f"{cell.range}, at {100 * control.price:.0f}%")


def progress(models: Sequence[ModelStudy]) -> Table | None:
    """What each model added to the one before; None where there is only one."""
    known = [(model.label, model.progress) for model in models if model.progress]
    if not known:
        return None
    heads = columns(
        "model", Column("against", kind="words"), "first turn", "last turn", "gain", "pass@k | largest k of both",
        "training scorer | last turn",
    )  # fmt: skip
    rows = tuple(
        (
            head(label),
            words(found.before),
            difference(found.direct),
            difference(found.last),
            difference(found.gain),
            difference(found.pass_large.share if found.pass_large else None),
            _reward(found.reward),
        )
        for label, found in known
    )
    note = f"{rests_on(e for _, found in known for e in (found.direct, found.last))} In points, paired by prompt."
    return without_empty(Table("What each model added to the one before", heads, rows, note))


def _reward(change: Estimate | None) -> Cell:
    """A change in the units of the scorer."""
    if change is None:
        return DASH
    return Cell(signed(change.value, 3), between(change), tone(change), about=basis(change))


def every_turn(models: Sequence[ModelStudy]) -> Table:
    """Tokens, cuts and copies of every turn."""
    heads = columns(
        "model", "turn", "prompts", "right", "mean score", "tokens | per draft",
        "context tokens | from the cache", "cut short", "copies | of the draft shown",
    )  # fmt: skip
    rows = tuple(
        (
            head(model.label),
            count(row.turn),
            count(row.n),
            turn(row),
            decimal(row.mean_score),
            Cell(f"{row.tokens:,}", f"{row.tokens / row.drafts:.1f}") if row.tokens else DASH,
            Cell(f"{row.prompt_tokens:,}", f"{100 * row.cached_tokens / max(row.prompt_tokens, 1):.1f}%"),
            count(row.truncated),
            share(row.copied),
        )
        for model in models
        for row in model.turns
    )
    shares = [row for model in models for row in model.turns if row.mean_score is not None]
    return without_empty(Table("Every turn", heads, rows, rests_on(shares)))


def paths(model: ModelStudy) -> Table:
    """All ways through the turns, the most frequent first."""
    shown, rest = model.paths[:MOST_PATHS], model.paths[MOST_PATHS:]
    total = sum(path.count for path in model.paths)
    shares = [share(path.count / total) for path in shown]
    rows = [
        (Cell(path.pattern, kind="path"), count(path.count), bar)
        for path, bar in zip(shown, with_bars(shares, [path.count for path in shown]), strict=True)
    ]
    if rest:
        others = sum(path.count for path in rest)
        rows.append((words(f"{len(rest)} other paths"), count(others), share(others / total)))
    heads = columns("path", "prompts", Column("share", kind="bar"))
    early = len({len(path.pattern) for path in model.paths}) > 1
    note = f"n = {total:,} prompts{'; a path ends where its chain ended' if early else ', all with every turn'}."
    return Table(f"All paths, {model.label}", heads, tuple(rows), note)


def revisions(model: ModelStudy) -> Table:
    """What each refinement did to the drafts it was shown."""
    heads = columns(
        "turns", "fixed | of the wrong", "broken | of the right", "copied", "copied | of the right",
        "copied | of the wrong", "edit distance | in words",
    )  # fmt: skip
    rows = tuple(_revision(row) for row in model.revisions)
    estimates = [estimate for row in model.revisions for estimate in (row.fixed, row.broken)]
    return Table(f"Revisions, {model.label}", heads, rows, rests_on(estimates))


def _revision(row: Revision) -> tuple[Cell, ...]:
    return (
        head(f"{row.first} → {row.last}"),
        _of(row.fixed),
        _of(row.broken),
        share(row.copied),
        share(row.copied_right),
        share(row.copied_wrong),
        share(row.edit_distance),
    )


def _of(estimate: Estimate | None) -> Cell:
    """A share of a part of the prompts, with the size of that part."""
    cell = estimated(estimate)
    return cell if estimate is None else replace(cell, range=f"{cell.range}, n = {estimate.n:,}")


def tests(model: ModelStudy) -> Table:
    """McNemar's test of every pair of turns."""
    heads = columns(
        "turns", "prompts", "wrong → right", "right → wrong", "difference | points", "p | McNemar",
        "p | Holm", "detectable | points",
    )  # fmt: skip
    rows = tuple(_test(test) for test in model.tests)
    family = f"{len(model.tests)} pair{'s' if model.tests[1:] else ''} of turns"
    note = f"Exact two-sided tests; Holm's correction over {family}. Detectable: 80% power at the 5% level."
    return Table(f"All pairs of turns, {model.label}", heads, rows, note)


def _test(test: Tested) -> tuple[Cell, ...]:
    flips = test.flips
    points = 100 * (flips.wrong_to_right - flips.right_to_wrong) / flips.n
    shown = Cell(signed(points), tone=("better" if points > 0 else "worse") if test.p_holm < 0.05 else "")
    return (
        head(f"{flips.first} → {flips.last}"),
        count(flips.n),
        count(flips.wrong_to_right),
        count(flips.right_to_wrong),
        shown,
        p(flips.p_value),
        p(test.p_holm),
        decimal(flips.detectable, 1),
    )
