"""The figures of the page as inline SVG: text stays text, and the page's style sheet gives the colours.

Matplotlib draws with placeholder colours, each of which becomes a CSS variable, so that one drawing serves
light and dark. The same numbers give the same bytes. One unit of a drawing is one CSS pixel.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from io import StringIO
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from upturn.evaluation.summary import Measurement
from upturn.evaluation.turns import Majority

INK, MUTED, LINE, PAPER = "#fe00f0", "#fe00f1", "#fe00f2", "#fe00f3"
_NAMES = {INK: "ink", MUTED: "muted", LINE: "line", PAPER: "paper"}
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "axes.edgecolor": LINE,
    "axes.labelcolor": MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "xtick.color": LINE,
    "ytick.color": LINE,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "ytick.major.size": 0,
    "grid.color": LINE,
    "grid.linewidth": 0.7,
    "text.color": INK,
    "font.size": 13,
    "axes.labelsize": 13,
    "xtick.labelsize": 13,
    "ytick.labelsize": 13,
    "legend.frameon": False,
}
_MARKERS = "s^Dvpho"
NUM_SERIES = 6
"""Colours of the style sheet for the models before the last: --series-0 (before training) to --series-5."""


def series(place: int, num_measurements: int) -> str:
    """The colour's name in the style sheet; the last measured model always has the same, strongest one."""
    if place == num_measurements - 1:
        return "series-last"
    return f"series-{place if place < NUM_SERIES else 1 + (place - 1) % (NUM_SERIES - 1)}"


def turn_curves(measurements: Sequence[Measurement], width: int, height: int, name: str) -> str:
    """Accuracy by turn, one line per model, with its interval as a band. Sizes in CSS pixels."""
    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": name}):
        figure = Figure(figsize=(width / 72, height / 72), layout="constrained")
        axes = figure.add_subplot()
        ends = [_turn_curve(axes, place, m, len(measurements)) for place, m in enumerate(measurements)]
        axes.set_xlabel("turn")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        _percent_axis(axes)
        _label_ends(axes, ends, [m.label for m in measurements], height)
        return _svg(figure, name)


def token_curves(measurements: Sequence[Measurement], width: int, height: int, name: str) -> str:
    """Accuracy by generated tokens per prompt: refining turn by turn against a vote of direct answers."""
    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": name}):
        figure = Figure(figsize=(width / 72, height / 72), layout="constrained")
        axes = figure.add_subplot()
        ends, names = [], []
        for place, measured in enumerate(measurements):
            if measured.majority is None:
                continue
            ends += _token_curve(axes, place, measured, measured.majority, len(measurements))
            names += [f"{measured.label}, refining", f"{measured.label}, vote of {measured.majority.votes}"]
        axes.set_xlabel("generated tokens per prompt")
        axes.set_xlim(left=0)
        _percent_axis(axes)
        _label_ends(axes, ends, names, height)
        return _svg(figure, name)


def _turn_curve(axes: Axes, place: int, measured: Measurement, count: int) -> tuple[float, float]:
    colour, last = _placeholder(place, count), place == count - 1
    turns = [row.turn for row in measured.turns]
    accuracies = [row.accuracy for row in measured.turns]
    lows, highs = [row.low for row in measured.turns], [row.high for row in measured.turns]
    axes.fill_between(turns, lows, highs, color=colour, alpha=0.20 if last else 0.09, linewidth=0)
    axes.plot(
        turns,
        accuracies,
        color=colour,
        linewidth=3.2 if last else 2,
        linestyle="--" if place == 0 and not last else "-",
        marker="o" if last else _MARKERS[place % len(_MARKERS)],
        markersize=9 if last else 8,
        markeredgecolor=PAPER,
        markeredgewidth=1,
        zorder=3 + last,
    )
    return turns[-1], accuracies[-1]


def _token_curve(
    axes: Axes, place: int, measured: Measurement, vote: Majority, count: int
) -> list[tuple[float, float]]:
    colour, last = _placeholder(place, count), place == count - 1
    spent, used = [], 0
    for row in measured.turns:
        used += row.tokens
        spent.append(used / measured.n)
    accuracies = [row.accuracy for row in measured.turns]
    lows, highs = [row.low for row in measured.turns], [row.high for row in measured.turns]
    axes.fill_between(spent, lows, highs, color=colour, alpha=0.20 if last else 0.09, linewidth=0)
    axes.plot(spent, accuracies, color=colour, linewidth=3.2 if last else 2, marker="o", markersize=9)
    at = vote.tokens / vote.n
    errors = [[vote.accuracy - vote.low], [vote.high - vote.accuracy]]
    axes.errorbar(at, vote.accuracy, errors, color=colour, marker="D", markersize=9, markerfacecolor=PAPER, capsize=4)
    return [(spent[-1], accuracies[-1]), (at, vote.accuracy)]


def _percent_axis(axes: Axes) -> None:
    axes.yaxis.set_major_formatter(PercentFormatter(xmax=1, decimals=0))
    axes.yaxis.set_major_locator(MaxNLocator(nbins=6, steps=[1, 2, 5, 10]))
    axes.set_ylim(bottom=max(0.0, axes.get_ylim()[0]))
    axes.grid(axis="y")
    axes.set_axisbelow(True)


def _label_ends(axes: Axes, ends: Sequence[tuple[float, float]], names: Sequence[str], height: int) -> None:
    """Names beside the ends of the lines, pushed apart until none covers another."""
    bottom, top = axes.get_ylim()
    heights = _apart([y for _, y in ends], gap=17 * (top - bottom) / (height - 50))  # 50: the axis below
    left, right = axes.get_xlim()[0], max((x for x, _ in ends), default=1.0)
    leader = {"arrowstyle": "-", "color": LINE, "linewidth": 0.8, "shrinkA": 1, "shrinkB": 5}
    for (x, y), label_y, name in zip(ends, heights, names, strict=True):
        place = (right + 0.06 * (right - left), label_y)
        axes.annotate(name, xy=(x, y), xytext=place, va="center", arrowprops=leader, annotation_clip=False)


def _apart(values: Sequence[float], gap: float) -> list[float]:
    """The values, moved as little as needed for each to be `gap` from the next; the order stays."""
    order = sorted(range(len(values)), key=lambda place: values[place])
    moved = [values[place] for place in order]
    for _ in range(200):
        for below in range(len(moved) - 1):
            push = (gap - (moved[below + 1] - moved[below])) / 2
            if push > 1e-9:
                moved[below] -= push
                moved[below + 1] += push
    return [moved[order.index(place)] for place in range(len(values))]


def _placeholder(place: int, count: int) -> str:
    name = series(place, count)
    return "#fe01ff" if name == "series-last" else f"#fe010{name[-1]}"


def _svg(figure: Figure, name: str) -> str:
    text = StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(text, format="svg", transparent=True, metadata=nothing)
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r' xmlns(:\w+)?="[^"]*"| version="[^"]*"', "", svg, count=3)
    svg = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", svg)  # ids are unique on the page
    for colour, variable in _NAMES.items():
        svg = svg.replace(colour, f"var(--{variable})")
    svg = svg.replace("#fe01ff", "var(--series-last)")
    return re.sub(r"#fe010(\d)", r"var(--series-\1)", svg)
