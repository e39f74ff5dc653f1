"""One self-contained page, and tables, of several arms side by side."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from upturn.evaluation.compare import ArmRow, Comparison, Contrast, What
from upturn.report.arms import ArmCurve
from upturn.report.drawing import (
    DASHES,
    MARKERS,
    NUM_SERIES,
    Drawing,
    colour,
    draw,
    fitted,
    grid,
    label_ends,
    panel_title,
    panel_width,
    percent_axis,
)
from upturn.report.formats import between, listing, p_value, percent, signed, tone
from upturn.report.page import fill, write
from upturn.report.sections import Section
from upturn.report.tables import (
    Cell,
    Column,
    Table,
    columns,
    decimal,
    difference,
    estimated,
    head,
    p,
    rests_on,
    tokens,
    without_empty,
    words,
)

AT_EQUAL_TOKENS: What = "last turn at equal tokens"
LEVEL = 0.05
"""A difference is called one where Holm's p is below."""
FEW_SEEDS = (
    "Arms of several seeds are resampled over seeds and prompts, and with few seeds that is rough: where trainings"
    " differ by 10 points from seed to seed, three seeds give two equal arms p < 0.002 in 2 to 8 of 100 comparisons."
    " Holm's correction takes p as it is and does not mend that."
)
"""Simulated with 200 prompts, shared by the runs and each run's own: docs/measures.md."""


def write_comparison(path: Path, comparison: Comparison, curves: Sequence[ArmCurve], notes: Sequence[str]) -> Path:
    """Write the page and return its path. `notes`: how the runs became arms."""
    panels = [_curves_section(curves), _contrast_section(comparison), _arms_section(comparison, curves)]
    text = fill(
        "compare.html.jinja",
        names=[arm.name for arm in comparison.arms],
        headline=headlines(comparison),
        notes=notes,
        sections={panel.id: panel for panel in panels},
    )
    return write(path, text)


def headlines(comparison: Comparison) -> list[str]:
    """One sentence for each arm against the reference, at equal tokens where both can be had there."""
    told = {(c.before, c.after): c for c in comparison.contrasts if c.what in ("last turn", AT_EQUAL_TOKENS)}
    return [_sentence(contrast) for contrast in told.values()]


def _sentence(contrast: Contrast) -> str:
    where = f"at {contrast.tokens:,.0f} tokens per prompt" if contrast.tokens is not None else "at its last turn"
    change = contrast.difference
    within = f"95% interval {between(change, 100)}, {change.n:,} prompts, Holm's p {_is(contrast)}"
    points = 100 * change.value
    often = f"is right {abs(points):.1f} points {'more' if points > 0 else 'less'} often than {contrast.before} {where}"
    if contrast.p_holm < LEVEL:
        return f"{contrast.after} {often} ({within})."
    if tone(change):  # the interval is of this contrast alone
        return f"{contrast.after} {often}, but that is not proven after Holm's correction ({within})."
    return f"{contrast.after} and {contrast.before} cannot be told apart {where}: {signed(points)} points ({within})."


def _is(contrast: Contrast) -> str:
    text = p_value(contrast.p_holm, at_most=contrast.at_most)
    return text if text[0] in "<≤" else f"= {text}"


def arm_table(comparison: Comparison, curves: Sequence[ArmCurve]) -> Table:
    """One row per arm."""
    heads = columns(
        "arm", "turn 1", "last turn", "gain | points",
        "w→r | of all prompts", "r→w | of all prompts", "vote | of as many answers", "tokens | per prompt",
    )  # fmt: skip
    rows = tuple(_arm(arm, curve) for arm, curve in zip(comparison.arms, curves, strict=True))
    basis = rests_on(e for arm in comparison.arms for e in (arm.first, arm.last, arm.gain))
    return without_empty(Table("Arms", heads, rows, f"{basis} The arms share their prompts."))


def _arm(arm: ArmRow, curve: ArmCurve) -> tuple[Cell, ...]:
    return (
        replace(head(arm.name), range=f"{listing(list(dict.fromkeys(arm.labels)))}, {_seeds(arm)}"),
        estimated(arm.first),
        estimated(arm.last),
        difference(arm.gain),
        estimated(curve.fixed),
        estimated(curve.broken),
        estimated(arm.vote),
        tokens(arm.tokens),
    )


def _seeds(arm: ArmRow) -> str:
    return f"{len(arm.seeds)} seeds" if arm.seeds[1:] else f"seed {arm.seeds[0]}"


def contrast_table(comparison: Comparison) -> Table:
    """One row per contrast."""
    heads = columns(
        "arm", Column("what", kind="words"), "difference | points", "p", "p | Holm",
        Column("test", kind="words"), "tokens | per prompt",
    )  # fmt: skip
    rows = tuple(
        (
            head(contrast.after),
            words(contrast.what),
            _tested(contrast),
            p(contrast.p_value, at_most=contrast.at_most),
            p(contrast.p_holm, at_most=contrast.at_most),
            words(contrast.test),
            decimal(contrast.tokens, 1),
        )
        for contrast in comparison.contrasts
    )
    many = len(comparison.contrasts)
    note = f"{rests_on(c.difference for c in comparison.contrasts)} Holm's correction over these {many} contrasts."
    references = listing(list(dict.fromkeys(contrast.before for contrast in comparison.contrasts)))
    return without_empty(Table(f"Against {references}, on the same prompts", heads, rows, note))


def _tested(contrast: Contrast) -> Cell:
    """The difference, coloured only where it stands after Holm's correction."""
    cell = difference(contrast.difference)
    return cell if contrast.p_holm < LEVEL else replace(cell, tone="")


def _arms_section(comparison: Comparison, curves: Sequence[ArmCurve]) -> Section:
    lead = "w→r: wrong at the first turn and right at the last. r→w: the reverse."
    return Section("arms", "The arms in numbers", lead, tables=(arm_table(comparison, curves), _turns_table(curves)))


def _turns_table(curves: Sequence[ArmCurve]) -> Table:
    turns = range(max(len(curve.accuracy) for curve in curves))
    heads = columns("arm", *(f"turn {turn + 1}" for turn in turns))
    rows = tuple((head(curve.name), *(_at(curve, turn) for turn in turns)) for curve in curves)
    note = rests_on(estimate for curve in curves for estimate in curve.accuracy)
    return Table("Accuracy by turn, tokens per prompt up to it", heads, rows, note)


def _at(curve: ArmCurve, turn: int) -> Cell:
    if turn >= len(curve.accuracy):
        return Cell("–")
    cell = estimated(curve.accuracy[turn])
    return Cell(cell.text, f"{cell.range}, {curve.tokens[turn]:,.0f} tokens", about=cell.about)


def _contrast_section(comparison: Comparison) -> Section:
    lead = (
        "Each difference is paired: both arms answer the same prompts. Filled marks stay below 0.05 after Holm's"
        " correction."
    )
    if any(contrast.difference.how == "bootstrap over seeds and prompts" for contrast in comparison.contrasts):
        lead += f" {FEW_SEEDS}"
    return Section("contrasts", "Differences", lead, contrast_panels(comparison), tables=(contrast_table(comparison),))


def _curves_section(curves: Sequence[ArmCurve]) -> Section:
    lead = "Share of right answers, turn by turn and by the tokens spent. Bands are 95% intervals."
    return Section("curves", "Arms side by side", lead, arm_curves(curves))


def arm_curves(curves: Sequence[ArmCurve]) -> Drawing:
    """Accuracy by turn, and by generated tokens: a line per arm."""

    def paint(figure: Figure, narrow: bool) -> None:
        by_turn, by_tokens = grid(figure, 2, 1 if narrow else 2, sharey=True)
        height = 250 if narrow else 330
        _lines(by_turn, curves, [range(1, len(curve.accuracy) + 1) for curve in curves], height)
        by_turn.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        panel_title(by_turn, "By turn")
        _lines(by_tokens, curves, [curve.tokens for curve in curves], height)
        panel_title(by_tokens, "By generated tokens per prompt")
        by_tokens.tick_params(labelleft=True)

    told = "; ".join(f"{c.name}: " + ", ".join(percent(e.value) for e in c.accuracy) for c in curves)
    return draw("arms", "Accuracy of the arms by turn and by tokens", f"{told}.", paint, (400, 640))


def _lines(axes: Axes, curves: Sequence[ArmCurve], places: Sequence[Sequence[float]], height: int) -> None:
    ends: list[tuple[float, float]] = []
    inks = [colour(f"series-{place % NUM_SERIES}") for place in range(len(curves))]
    for place, (curve, xs, ink) in enumerate(zip(curves, places, inks, strict=True)):
        values = [estimate.value for estimate in curve.accuracy]
        lows, highs = [e.low for e in curve.accuracy], [e.high for e in curve.accuracy]
        axes.fill_between(xs, lows, highs, color=ink, alpha=0.12, linewidth=0)
        style = {"marker": MARKERS[place % len(MARKERS)], "linestyle": DASHES[place % len(DASHES)]}
        axes.plot(xs, values, color=ink, linewidth=2.2, markersize=6, **style)
        ends.append((xs[-1], values[-1]))
    percent_axis(axes)
    low, high = axes.get_ylim()
    label_ends(axes, ends, [curve.name for curve in curves], inks, gap=17 / height * (high - low))


def contrast_panels(comparison: Comparison) -> Drawing:
    """Every difference with its interval, one panel per question, one row per arm."""
    contrasts = comparison.contrasts
    questions = list(dict.fromkeys(contrast.what for contrast in contrasts))
    arms = list(dict.fromkeys(contrast.after for contrast in contrasts))

    def paint(figure: Figure, narrow: bool) -> None:
        panels = grid(figure, len(questions), 1 if narrow else len(questions), sharex=True, sharey=not narrow)
        for axes, question in zip(panels, questions, strict=True):
            _forest(axes, [c for c in contrasts if c.what == question], arms)
            panel_title(axes, question[0].upper() + question[1:])
            axes.tick_params(labelbottom=True)
            axes.set_xlabel("points")

    told = "; ".join(f"{c.after} against {c.before}, {c.what}: {signed(100 * c.difference.value)}" for c in contrasts)
    rows = 42 * len(arms)
    return draw("forest", "Differences in points", f"{told}.", paint, (90 + rows, (95 + rows) * len(questions)))


def _forest(axes: Axes, contrasts: Sequence[Contrast], arms: Sequence[str]) -> None:
    axes.axvline(0, color=colour("muted"), linewidth=1)
    for contrast in contrasts:
        row = arms.index(contrast.after)
        change = contrast.difference
        ink = colour("accent" if contrast.p_holm < LEVEL else "muted")
        errors = [[100 * (change.value - change.low)], [100 * (change.high - change.value)]]
        filled = ink if contrast.p_holm < LEVEL else colour("paper")
        style = {"marker": "o", "markersize": 7, "markerfacecolor": filled, "markeredgewidth": 1.6, "elinewidth": 1.6}
        axes.errorbar([100 * change.value], [row], xerr=errors, color=ink, **style)
        points = 100 * change.value
        axes.annotate(signed(points), (points, row), (0, 7), textcoords="offset points", ha="center", fontsize=12)
    axes.set_ylim(len(arms) - 0.5, -0.6)
    axes.set_yticks(range(len(arms)), labels=[_in_lines(arm, 0.3 * panel_width(axes)) for arm in arms])
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.grid(axis="x")
    axes.set_axisbelow(True)


def _in_lines(name: str, pixels: float) -> str:
    """A name in two lines at most, so that names which begin alike are told apart; cut where a line is too long."""
    first, *rest = textwrap.wrap(name, max(3, int(pixels / 7)), break_long_words=False) or [name]
    return "\n".join(fitted(line, pixels) for line in [first, " ".join(rest)] if line)
