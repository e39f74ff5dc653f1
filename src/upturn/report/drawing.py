"""Figures as inline SVG: text stays text, and the page's style sheet gives the colours.

Matplotlib draws with placeholder colours, each of which becomes a CSS variable, so that one drawing serves light and
dark. Every figure is drawn twice, for a desk and for a phone. The same numbers give the same bytes. One unit of a
drawing is one CSS pixel.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from io import StringIO
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

_COLOURS = (
    *("ink", "muted", "line", "paper", "ghost", "accent", "right", "wrong", "right-text", "wrong-text"),
    *("vote", "best", "fresh"),
    *(f"series-{place}" for place in range(8)),
)
"""The CSS variables that a drawing may use; a colour is known by its place here."""

NUM_SERIES = 8
"""Colours for series that stand side by side: --series-0 to --series-7."""
MARKERS = "osD^vPXh"
"""One per series, so that colour is never the only difference."""
DASHES: tuple[Any, ...] = ("-", (0, (6, 2)), (0, (2, 1.5)), (0, (7, 2, 2, 2)))


def colour(name: str) -> str:
    """The placeholder of a CSS variable. Raises ValueError where the style sheet has no such colour."""
    return f"#fe00{_COLOURS.index(name):02x}"


_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "axes.edgecolor": colour("line"),
    "axes.labelcolor": colour("muted"),
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "xtick.color": colour("line"),
    "ytick.color": colour("line"),
    "xtick.labelcolor": colour("muted"),
    "ytick.labelcolor": colour("muted"),
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "xtick.major.pad": 6,
    "grid.color": colour("line"),
    "grid.linewidth": 0.8,
    "text.color": colour("ink"),
    "font.size": 13,
    "axes.labelsize": 13,
    "axes.titlesize": 13,
    "xtick.labelsize": 12,
    "ytick.labelsize": 12,
    "lines.solid_capstyle": "round",
    "lines.solid_joinstyle": "round",
}


@dataclass(frozen=True, slots=True)
class Drawing:
    """A figure of the page."""

    name: str
    """Also the prefix of its ids."""
    title: str
    description: str
    """What it shows, for those who do not see it."""
    screens: tuple[tuple[str, str], ...]
    """(which screens, SVG): 'wide' and 'narrow'."""


Paint = Callable[[Figure, bool], None]
"""Draws into an empty figure; the flag says that it is for a phone."""

WIDTHS = {"wide": 960, "narrow": 358}


def draw(name: str, title: str, description: str, paint: Paint, heights: tuple[int, int]) -> Drawing:
    """The figure for a desk and for a phone, `heights` in CSS pixels."""
    screens = []
    for (screen, width), height in zip(WIDTHS.items(), heights, strict=True):
        ids = f"{name}-{screen}"
        with matplotlib.rc_context({**_STYLE, "svg.hashsalt": ids}):
            figure = Figure(figsize=(width / 72, height / 72), layout="constrained")
            engine: Any = figure.get_layout_engine()
            engine.set(w_pad=2 / 72, h_pad=2 / 72, wspace=0.03, hspace=0.06)
            paint(figure, screen == "narrow")
            screens.append((screen, _svg(figure, ids, title, description)))
    return Drawing(name, title, description, tuple(screens))


def grid(figure: Figure, count: int, columns: int, *, sharex: bool = False, sharey: bool = False) -> list[Axes]:
    """`count` panels in rows of `columns`; the empty places of the last row stay empty."""
    rows = -(-count // columns)
    cells = figure.subplots(rows, columns, squeeze=False, sharex=sharex, sharey=sharey)
    panels = list(cells.flat)
    for empty in panels[count:]:
        empty.set_axis_off()
    return panels[:count]


def columns_of(count: int, most: int) -> int:
    """Columns for `count` panels, at most `most` in a row, in rows as equal as can be."""
    rows = -(-count // most)
    return -(-count // rows)


def percent_axis(axes: Axes, nbins: int = 5) -> None:
    """Shares on the y axis, with faint lines across."""
    axes.yaxis.set_major_formatter(PercentFormatter(xmax=1, decimals=0))
    axes.yaxis.set_major_locator(MaxNLocator(nbins=nbins, steps=[1, 2, 2.5, 5, 10]))
    axes.grid(axis="y")
    axes.set_axisbelow(True)


def panel_width(axes: Axes) -> float:
    """About how many CSS pixels a panel has, with its labels."""
    figure, cells = axes.get_figure(root=True), axes.get_subplotspec()
    assert figure is not None and cells is not None
    return figure.get_figwidth() * 72 / cells.get_gridspec().ncols


def fitted(text: str, pixels: float) -> str:
    """The text, cut with an ellipsis where it is wider than so many pixels, at about 7 a character."""
    most = max(3, int(pixels / 7))
    return text if len(text) <= most else f"{text[: most - 1].rstrip()}…"


def panel_title(axes: Axes, title: str, about: str = "") -> None:
    """A title at the left, and a fainter line under it."""
    axes.set_title(fitted(title, panel_width(axes) - 40), loc="left", fontweight="bold", pad=26 if about else 10)
    if about:
        style = {"color": colour("muted"), "fontsize": 12, "va": "bottom"}
        axes.annotate(about, (0, 1), (0, 9), "axes fraction", "offset points", **style)


def label_ends(
    axes: Axes, points: Sequence[tuple[float, float]], names: Sequence[str], inks: Sequence[str], *, gap: float
) -> None:
    """Names beside the ends of lines, pushed apart until none covers another. `gap` in data units."""
    heights = apart([y for _, y in points], gap)
    right = max((x for x, _ in points), default=1.0)
    left, room = axes.get_xlim()[0], 0.34 * panel_width(axes)
    leader = {"arrowstyle": "-", "color": colour("line"), "linewidth": 1, "shrinkA": 2, "shrinkB": 6}
    for point, height, name, ink in zip(points, heights, names, inks, strict=True):
        place = (right + 0.05 * (right - left), height)
        style = {"va": "center", "color": ink, "arrowprops": leader, "annotation_clip": False}
        axes.annotate(fitted(name, room), point, place, **style)


def apart(values: Sequence[float], gap: float) -> list[float]:
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


def _svg(figure: Figure, ids: str, title: str, description: str) -> str:
    text = StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(text, format="svg", transparent=True, metadata=nothing)
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r' xmlns(:\w+)?="[^"]*"| version="[^"]*"', "", svg, count=3)
    svg = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", svg, flags=re.DOTALL)
    svg = re.sub(r' (?:d|x|y|transform)="[^"]*"', lambda found: _rounded(found[0]), svg)
    svg = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{ids}-", svg)  # ids are unique on the page
    svg = re.sub(r"#fe00([0-9a-f]{2})", lambda found: f"var(--{_COLOURS[int(found[1], 16)]})", svg)
    head = f'<svg role="img" aria-labelledby="{ids}-title {ids}-desc"'
    told = f'<title id="{ids}-title">{escape(title)}</title><desc id="{ids}-desc">{escape(description)}</desc>'
    opening, rest = svg.removeprefix("<svg").split(">", 1)
    return re.sub(r"\s*\n\s*", "\n", f"{head}{opening}>{told}{rest}")


def _rounded(attribute: str) -> str:
    """Coordinates to a hundredth of a pixel: half the bytes, the same picture."""
    return re.sub(r"-?\d+\.\d{3,}(?:e-?\d+)?", lambda found: f"{float(found[0]):.2f}", attribute)
