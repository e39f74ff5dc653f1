"""How prompts flow between right and wrong from turn to turn, as an alluvial picture."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from upturn.evaluation.study import ModelStudy, Path
from upturn.report.drawing import Drawing, colour, draw, grid, panel_title, panel_width

_HALF = 0.035
"""Half the width of a column, where columns are 1 apart."""


def flow_panels(models: Sequence[ModelStudy]) -> Drawing:
    """One panel per model: columns are turns, ribbons are prompts that stay or change sides."""
    turns = len(models[0].turns)
    across = len(models) if turns <= 5 else 1

    def paint(figure: Figure, narrow: bool) -> None:
        panels = grid(figure, len(models), 1 if narrow else across)
        for axes, model in zip(panels, models, strict=True):
            _flow(axes, model.paths)
            panel_title(axes, model.label, f"{model.n:,} prompts")

    told = "; ".join(f"{model.label}: {_told(model)}" for model in models)
    heights = (360 if across > 1 or len(models) == 1 else 340 * len(models), 300 * len(models))
    return draw("flow", "Prompts between right and wrong", f"{told}.", paint, heights)


def steps(paths: Sequence[Path]) -> list[Counter[str]]:
    """Between neighbouring turns: how many prompts went 'rr', 'rw', 'wr' and 'ww'.

    A chain that ended early keeps its last answer, so that every column holds all prompts.
    """
    turns = max(len(path.pattern) for path in paths)
    found = [Counter[str]() for _ in range(turns - 1)]
    for path in paths:
        for place, (before, after) in enumerate(pairwise(path.pattern.ljust(turns, path.pattern[-1]))):
            found[place][before + after] += path.count
    return found


def _told(model: ModelStudy) -> str:
    return ", ".join(
        f"turn {turn} to {turn + 1}: {step['wr']} fixed, {step['rw']} broken"
        for turn, step in enumerate(steps(model.paths), 1)
    )


def _flow(axes: Axes, paths: Sequence[Path]) -> None:
    flows = steps(paths)
    right = [flow["rr"] + flow["rw"] for flow in flows] + [flows[-1]["rr"] + flows[-1]["wr"]]
    total = flows[0].total()
    space = 0.03 * total
    room = panel_width(axes) / len(right)
    for turn, count in enumerate(right, 1):
        _column(axes, turn, count, total, space, told=room > 32)
    for turn, flow in enumerate(flows, 1):
        _ribbons(axes, turn, flow, space)
        if room > 64:
            _counts(axes, turn + 0.5, flow, total + space, beside=room > 105)
    axes.set_xlim(1 - 0.25, len(right) + 0.25)
    axes.set_ylim(0, 1.15 * (total + space))
    turns = range(1, len(right) + 1)
    axes.set_xticks(turns, labels=[f"turn {turn}" if room > 48 else str(turn) for turn in turns])
    axes.set_yticks([])
    axes.spines["bottom"].set_visible(False)


def _column(axes: Axes, turn: int, right: int, total: int, space: float, *, told: bool) -> None:
    """Right answers above wrong ones, and their share where there is room to tell it."""
    wrong = total - right
    axes.fill_between([turn - _HALF, turn + _HALF], 0, wrong, color=colour("wrong"), linewidth=0)
    axes.fill_between([turn - _HALF, turn + _HALF], wrong + space, total + space, color=colour("right"), linewidth=0)
    if told:
        style = {"textcoords": "offset points", "ha": "center", "va": "bottom", "fontsize": 12, "fontweight": "bold"}
        axes.annotate(f"{100 * right / total:.0f}%", (turn, total + space), (0, 4), color=colour("ink"), **style)


def _ribbons(axes: Axes, turn: int, flow: Counter[str], space: float) -> None:
    """Left: wrong staying, wrong fixed, gap, right broken, right staying. Right: wrong staying, broken, gap, fixed."""
    stay, fixed, broken, kept = flow["ww"], flow["wr"], flow["rw"], flow["rr"]
    left_right, right_right = stay + fixed + space, stay + broken + space
    _ribbon(axes, turn, (0, 0), stay, "wrong", 0.13)
    _ribbon(axes, turn, (left_right + broken, right_right + fixed), kept, "right", 0.13)
    _ribbon(axes, turn, (stay, right_right), fixed, "right", 0.55)
    _ribbon(axes, turn, (left_right, stay), broken, "wrong", 0.70)


def _ribbon(axes: Axes, turn: int, bottoms: tuple[float, float], count: int, ink: str, alpha: float) -> None:
    if not count:
        return
    along = np.linspace(0, 1, 25)
    rise = along**2 * (3 - 2 * along)
    bottom = bottoms[0] + (bottoms[1] - bottoms[0]) * rise
    place = turn + _HALF + along * (1 - 2 * _HALF)
    axes.fill_between(place, bottom, bottom + count, color=colour(ink), alpha=alpha, linewidth=0)


def _counts(axes: Axes, x: float, flow: Counter[str], top: float, *, beside: bool) -> None:
    """How many were fixed and broken, above the ribbons: side by side, or one over the other."""
    places = ((-3, 4), (3, 4)) if beside else ((0, 17), (0, 3))
    sides = ("right", "left") if beside else ("center", "center")
    told = ((f"+{flow['wr']}", "right-text"), (f"−{flow['rw']}", "wrong-text"))
    for (text, ink), place, side in zip(told, places, sides, strict=True):
        style = {"textcoords": "offset points", "ha": side, "va": "bottom", "fontsize": 12, "color": colour(ink)}
        axes.annotate(text, (x, top), place, **style)
