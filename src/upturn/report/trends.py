"""What moves from model to model and from step to step: drift, and the loss of every training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from upturn.evaluation.study import Drift, ModelStudy
from upturn.report.drawing import (
    DASHES,
    MARKERS,
    Drawing,
    colour,
    columns_of,
    draw,
    fitted,
    grid,
    panel_title,
    panel_width,
)


@dataclass(frozen=True, slots=True)
class Trend:
    """One small panel: a quantity, model by model."""

    title: str
    unit: str
    lines: tuple[tuple[str, tuple[float | None, ...]], ...]
    """(name, one value per model)."""


def trends(models: Sequence[ModelStudy]) -> list[Trend]:
    """The quantities of drift that were measured for at least one model."""
    drifts = [model.drift for model in models]
    first, last = (tuple(length or None for length in _of(drifts, name)) for name in ("length", "length_last"))
    lengths = (("first turn", first), ("last turn", last))  # of 0 where an endpoint tells none
    rewards = (("first turn", _of(drifts, "reward_first")), ("last turn", _of(drifts, "reward")))
    distinct = tuple((f"n = {n}", tuple(drift.distinct[n - 1] for drift in drifts)) for n in (1, 2, 3))
    passed = tuple(drift.pass_large and drift.pass_large.share.value for drift in drifts)
    found = [
        Trend("KL", "nats per token", (("start", _of(drifts, "kl_start")), ("previous", _of(drifts, "kl_previous")))),
        Trend("Length", "tokens", lengths),
        Trend("Distinct n-grams", "share", distinct),
        Trend("Entropy", "nats per token", (("", _of(drifts, "entropy")),)),
        Trend("Identical answers", "share of pairs", (("", _of(drifts, "identical")),)),
        Trend(_pass_name(drifts), "share", (("", passed),)),
        Trend("Training scorer", "mean score", rewards),
    ]
    return [trend for trend in found if any(value is not None for _, values in trend.lines for value in values)]


def _of(drifts: Sequence[Drift], field: str) -> tuple[float | None, ...]:
    return tuple(getattr(drift, field) for drift in drifts)


def _pass_name(drifts: Sequence[Drift]) -> str:
    most = max((drift.pass_large.k for drift in drifts if drift.pass_large), default=0)
    return f"pass@{most}"


def drift_panels(models: Sequence[ModelStudy]) -> Drawing:
    """Small multiples: one quantity each, from the first model to the last."""
    shown = trends(models)
    columns = columns_of(len(shown), 4)
    rows, phone_rows = -(-len(shown) // columns), -(-len(shown) // 2)
    names = [_short(model.label) for model in models]

    def paint(figure: Figure, narrow: bool) -> None:
        for axes, trend in zip(grid(figure, len(shown), 2 if narrow else columns), shown, strict=True):
            _trend(axes, trend, names)

    lines = [(trend.title, name or trend.unit, values) for trend in shown for name, values in trend.lines]
    told = "; ".join(f"{title}, {name}: {_values(values)}" for title, name, values in lines)
    return draw("drift", "Drift from model to model", f"{told}.", paint, (215 * rows, 205 * phone_rows))


def _values(values: Sequence[float | None]) -> str:
    return ", ".join("not measured" if value is None else f"{value:.3g}" for value in values)


def _short(label: str) -> str:
    """'iteration 3' as '3', so that it fits under a small panel."""
    return label.removeprefix("iteration ")


def _trend(axes: Axes, trend: Trend, names: Sequence[str]) -> None:
    inks = ("accent", "muted", "best")
    for place, (name, values) in enumerate(trend.lines):
        known = [(x, value) for x, value in enumerate(values) if value is not None]
        if known:
            xs, ys = zip(*known, strict=True)
            style = {"linestyle": DASHES[place], "marker": MARKERS[place], "markersize": 5, "linewidth": 1.8}
            axes.plot(xs, ys, color=colour(inks[place]), label=name, **style)
    axes.set_xlim(-0.3, len(names) - 0.7)
    _from_zero(axes, [value for _, values in trend.lines for value in values if value is not None])
    step = 1 + len(names) // 8
    room = 0.8 * panel_width(axes) * step / len(names)
    axes.set_xticks(range(0, len(names), step), labels=[fitted(name, room) for name in names[::step]])
    axes.yaxis.set_major_locator(MaxNLocator(3))
    axes.grid(axis="y")
    panel_title(axes, trend.title, trend.unit)
    if len(trend.lines) > 1:
        style = {"fontsize": 11, "labelcolor": colour("muted"), "handlelength": 1.6, "labelspacing": 0.25}
        axes.legend(frameon=False, borderaxespad=0, **style)


def _from_zero(axes: Axes, values: Sequence[float]) -> None:
    """The y axis with 0 in it, and room above the highest line."""
    low, high = min(0.0, *values), max(0.0, *values)
    room = 0.12 * (high - low) or 1.0
    axes.set_ylim(low - (room if low < 0 else 0), high + room)


def loss_panels(losses: Sequence[tuple[str, Sequence[float]]]) -> Drawing:
    """The loss of every optimizer step, one panel per training. `losses`: (label, one value per step)."""
    columns = columns_of(len(losses), 4)
    rows, phone_rows = -(-len(losses) // columns), -(-len(losses) // 2)

    def paint(figure: Figure, narrow: bool) -> None:
        for axes, (label, values) in zip(grid(figure, len(losses), 2 if narrow else columns), losses, strict=True):
            axes.plot(range(1, len(values) + 1), values, color=colour("accent"), linewidth=1.4)
            _from_zero(axes, values)
            axes.xaxis.set_major_locator(MaxNLocator(3, integer=True))
            axes.yaxis.set_major_locator(MaxNLocator(3))
            axes.grid(axis="y")
            axes.set_xlabel("step")
            panel_title(axes, label)

    told = "; ".join(
        f"{label}: {values[0]:.3g} at the first of {len(values)} steps, {values[-1]:.3g} at the last"
        for label, values in losses
    )
    return draw("loss", "Loss by optimizer step", f"{told}.", paint, (190 * rows, 190 * phone_rows))
