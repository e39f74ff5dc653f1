"""Accuracy by turn, by price, and by number of answers: the figures that say whether refining pays."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, MaxNLocator

from upturn.evaluation.controls import at_equal_tokens
from upturn.evaluation.stats import Estimate
from upturn.evaluation.study import Method, ModelStudy
from upturn.evaluation.turns import TurnRow
from upturn.report.drawing import Drawing, colour, columns_of, draw, grid, label_ends, panel_title, percent_axis
from upturn.report.formats import between, percent, signed

CONTROLS: dict[Method, tuple[str, str]] = {
    "majority": ("vote", "D"),
    "best of n": ("best", "^"),
    "resample": ("fresh", "x"),
}
"""Method -> its colour and marker, in every figure."""
NAMES: dict[Method, str] = {
    "refine": "refining",
    "majority": "vote",
    "best of n": "best by the scorer",
    "resample": "fresh answer",
}


@dataclass(frozen=True, slots=True)
class Control:
    """What the same tokens buy without refining."""

    method: Method
    accuracy: Estimate
    price: float
    """Its tokens over those of the chain."""


def turn_panels(models: Sequence[ModelStudy]) -> Drawing:
    """A panel per model: its accuracy by turn, the other models' behind it, the controls beside it."""
    columns, phone = columns_of(len(models), 5), columns_of(len(models), 2)
    rows, phone_rows = -(-len(models) // columns), -(-len(models) // phone)

    def paint(figure: Figure, narrow: bool) -> None:
        panels = grid(figure, len(models), phone if narrow else columns, sharex=True, sharey=True)
        panels[0].set_ylim(_limits(models))
        for place, (axes, model) in enumerate(zip(panels, models, strict=True)):
            for other in models:
                if other is not model and len(models) > 1:
                    axes.plot(*_curve(other), color=colour("ghost"), linewidth=1.2, zorder=1)
            _turn_panel(axes, model, strong=place > 0 or len(models) == 1)
            axes.tick_params(labelbottom=True)

    told = "; ".join(
        f"{model.label}: " + ", ".join(f"turn {row.turn} {percent(row.accuracy)}" for row in model.turns)
        for model in models
    )
    height = 380 if rows == 1 else 270 * rows
    return draw(
        "turns", "Accuracy by turn", f"One panel per model. {told}.", paint, (height, max(250 * phone_rows, 320))
    )


def _limits(models: Sequence[ModelStudy]) -> tuple[float, float]:
    """Room for every interval, and for a number above and below."""
    shown: list[TurnRow | Estimate] = [row for model in models for row in model.turns]
    shown += [control.accuracy for model in models for control in equal_tokens(model)]
    low, high = min(row.low for row in shown), max(row.high for row in shown)
    room = 0.12 * (high - low)
    return max(0.0, low - room), high + room


def _curve(model: ModelStudy) -> tuple[list[int], list[float]]:
    return [row.turn for row in model.turns], [row.accuracy for row in model.turns]


def _turn_panel(axes: Axes, model: ModelStudy, *, strong: bool) -> None:
    ink = colour("accent" if strong else "muted")
    turns, accuracies = _curve(model)
    lows, highs = [row.low for row in model.turns], [row.high for row in model.turns]
    axes.fill_between(turns, lows, highs, color=ink, alpha=0.16, linewidth=0, zorder=2)
    axes.plot(turns, accuracies, color=ink, linewidth=2.4, marker="o", markersize=6, zorder=4, clip_on=False)
    rises = accuracies[-1] >= accuracies[0]
    _number(axes, model.turns[-1], ink, "right", above=rises)
    if len(turns) > 1:
        _number(axes, model.turns[0], ink, "left", above=not rises)
    controls, step = equal_tokens(model), max(0.42, 0.1 * len(turns))
    for place, control in enumerate(controls, 1):
        _mark(axes, turns[-1] + step * place, control)
    axes.set_xlim(turns[0] - 0.4, turns[-1] + step * len(controls) + 0.4)
    axes.xaxis.set_major_locator(FixedLocator(turns) if len(turns) <= 8 else MaxNLocator(5, integer=True))
    axes.set_xlabel("turn", labelpad=2)
    percent_axis(axes)
    gain = f"{signed(model.gain.points)} ({between(model.gain)})" if model.gain else ""
    panel_title(axes, model.label, gain)


def _number(axes: Axes, row: TurnRow, ink: str, side: str, *, above: bool) -> None:
    """A number at the end of a band, on the side that the curve leaves free; never under the axis."""
    bottom, top = axes.get_ylim()
    above = above or row.low < bottom + 0.1 * (top - bottom)
    style = {"ha": side, "va": "bottom" if above else "top", "color": ink, "fontweight": "bold", "fontsize": 12}
    point, offset = (row.turn, row.high if above else row.low), (-6 if side == "left" else 6, 4 if above else -4)
    axes.annotate(percent(row.accuracy), point, offset, textcoords="offset points", **style)


def _mark(axes: Axes, x: float, control: Control) -> None:
    """A control with its interval."""
    name, marker = CONTROLS[control.method]
    value = control.accuracy
    errors = [[value.value - value.low], [value.high - value.value]]
    style = {"color": colour(name), "marker": marker, "markersize": 7, "markerfacecolor": colour("paper")}
    axes.errorbar(x, value.value, errors, markeredgewidth=1.6, elinewidth=1.2, zorder=5, **style)


def equal_tokens(model: ModelStudy) -> list[Control]:
    """Each control at the tokens of the whole chain; where it was not sampled so far, its largest number of answers.

    None of them where tokens are unknown.
    """
    price = max((point.tokens for point in model.costs if point.method == "refine"), default=0)
    found = []
    for method in CONTROLS:
        points = [point for point in model.costs if point.method == method]
        if price and points:
            equal = at_equal_tokens(points, price)
            found.append(Control(method, equal or points[-1].accuracy, 1.0 if equal else points[-1].tokens / price))
    return found


def cost_panels(models: Sequence[ModelStudy]) -> Drawing:
    """Accuracy against generated tokens per prompt: refining, and what the same tokens buy otherwise."""

    def paint(figure: Figure, narrow: bool) -> None:
        panels = grid(figure, len(models), 1 if narrow else len(models), sharex=True, sharey=True)
        top = max(point.tokens for model in models for point in model.costs)
        for axes, model in zip(panels, models, strict=True):
            percent_axis(axes)
            axes.set_xlim(0, 1.04 * top)
            _cost_lines(axes, model, gap=17 / (300 if narrow else 330))
            panel_title(axes, model.label)
            axes.set_xlabel("generated tokens per prompt")
            axes.tick_params(labelbottom=True)

    told = "; ".join(f"{model.label}, {_told(model)}" for model in models)
    return draw("cost", "Accuracy by generated tokens", f"{told}.", paint, (380, 330 * len(models)))


def _told(model: ModelStudy) -> str:
    methods = dict.fromkeys(point.method for point in model.costs)
    lasts = [[point for point in model.costs if point.method == method][-1] for method in methods]
    return ", ".join(f"{NAMES[p.method]} {percent(p.accuracy.value)} at {p.tokens:.0f} tokens" for p in lasts)


def _cost_lines(axes: Axes, model: ModelStudy, gap: float) -> None:
    ends: list[tuple[float, float]] = []
    names, inks = [], []
    for method in ("refine", *CONTROLS):
        points = [point for point in model.costs if point.method == method]
        if not points:
            continue
        name, marker = CONTROLS.get(method, ("accent", "o"))
        xs, ys = [point.tokens for point in points], [point.accuracy.value for point in points]
        _band(axes, xs, [point.accuracy for point in points], colour(name))
        main = method == "refine"
        axes.plot(
            xs,
            ys,
            color=colour(name),
            linewidth=2.4 if main else 1.6,
            marker=marker,
            markersize=6,
            markerfacecolor=colour(name if main else "paper"),
            zorder=4 if main else 3,
        )
        ends.append((xs[-1], ys[-1]))
        names.append(NAMES[method])
        inks.append(colour(name))
    low, high = axes.get_ylim()
    label_ends(axes, ends, names, inks, gap=gap * (high - low))


def _band(axes: Axes, xs: Sequence[float], estimates: Sequence[Estimate], ink: str) -> None:
    axes.fill_between(xs, [e.low for e in estimates], [e.high for e in estimates], color=ink, alpha=0.10, linewidth=0)


def pass_curves(models: Sequence[ModelStudy]) -> Drawing:
    """pass@k of the direct answers of every model that has them, the last one strongest."""
    shown = [(model, model.ceilings.pass_at) for model in models if model.ceilings]

    def paint(figure: Figure, narrow: bool) -> None:
        axes = figure.subplots()
        ends, inks = [], []
        for place, (_, points) in enumerate(shown):
            first, last = place == 0, place == len(shown) - 1
            ink = colour("accent" if last else "muted" if first else "ghost")
            ks, shares = [point.k for point in points], [point.share.value for point in points]
            if first or last:
                _band(axes, ks, [point.share for point in points], ink)
            axes.plot(ks, shares, color=ink, linewidth=2.4 if last else 1.6, marker="o", markersize=6 if last else 4)
            ends.append((ks[-1], shares[-1]))
            inks.append(ink if first or last else colour("muted"))
        most = max(k for k, _ in ends)
        if most > 8:
            axes.set_xscale("log", base=2)
        ticks = [2**p for p in range(most.bit_length())] if most > 8 else range(1, most + 1)
        axes.set_xticks(list(ticks), labels=[str(k) for k in ticks])
        axes.set_xlabel("direct answers, k")
        percent_axis(axes)
        low, high = axes.get_ylim()
        gap = 17 * (high - low) / (230 if narrow else 250)
        label_ends(axes, ends, [model.label for model, _ in shown], inks, gap=gap)

    told = "; ".join(
        f"{model.label}: " + ", ".join(f"k={p.k} {percent(p.share.value)}" for p in points) for model, points in shown
    )
    return draw("pass", "pass@k", f"{told}.", paint, (310, 300))
