"""A run in the terminal: the turn table, any table of the page, coloured diffs, and the verdict."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass

from rich import box
from rich.console import Console, ConsoleOptions, Group, RenderResult
from rich.table import Table as Rich
from rich.text import Text

from upturn.evaluation.study import Study
from upturn.evaluation.summary import Measurement, Summary
from upturn.evaluation.turns import Gain, TurnRow
from upturn.report.diff import word_diff
from upturn.report.formats import between, headline, signed, tone
from upturn.report.tables import Cell, Table

UNBOUND = 10_000
"""Columns where nobody's terminal bounds a line."""
CUT = "…"
"""What rich puts in the place of what a column has no room for."""
_TONES = {"better": "green", "worse": "red", "": ""}
_STYLES = {"same": "", "gap": "", "added": "underline green", "removed": "strike red"}


@dataclass(frozen=True, slots=True)
class Folding:
    """A table; where the width would cut anything in it, a line for each of its cells instead."""

    whole: Rich

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        drawn = list(console.render(self.whole, options))
        is_cut = any(CUT in segment.text for segment in drawn)
        yield from console.render(_folded(self.whole), options) if is_cut else drawn


def console() -> Console:
    """Standard output. In a pipe or a file a line is as long as it needs, unless COLUMNS says how long."""
    return Console() if sys.stdout.isatty() or os.environ.get("COLUMNS") else Console(width=UNBOUND)


def turn_table(summary: Summary) -> Folding:
    """One row per measured model: accuracy per turn in percent, and what the last turn adds to the first."""
    rows = [row for measured in summary.measurements for row in measured.turns]
    turns = sorted({row.turn for row in rows})
    unjudged = rows and all(row.mean_score is None for row in rows)
    told = "no verifier judged these answers" if unjudged else "right answers in %, with 95% intervals"
    drawn = _empty(
        f"{summary.name}: {told}",
        "gain: last turn against first, in points · w→r: from wrong to right, r→w: the reverse"
        " · same: last turn repeats the draft it was shown",
    )
    if len(turns) > 3 and not unjudged:
        drawn.padding = 0  # four turns with their intervals fit into 80 columns
    drawn.add_column("", style="bold", no_wrap=True)
    for header in (*(f"turn {turn}" for turn in turns), "gain", "w→r\nr→w", "same"):
        drawn.add_column(header, justify="right", no_wrap=True)
    for measured in summary.measurements:
        rows = {row.turn: row for row in measured.turns}
        drawn.add_row(measured.label, *(_accuracy(rows.get(turn)) for turn in turns), *_change(measured))
    return Folding(drawn)


def table(shown: Table) -> Folding:
    """A table of the page."""
    drawn = _empty(shown.title, shown.note)
    for place, column in enumerate(shown.columns):
        justify = "right" if place and column.kind == "number" else "left"
        name = f"{column.head}\n{column.unit}" if column.unit else column.head
        drawn.add_column(name, justify=justify, style="" if place else "bold", no_wrap=not place)
    for row in shown.rows:
        drawn.add_row(*map(_cell, row))
    return Folding(drawn)


def verdict(study: Study) -> str:
    """The verdict on the last measured model, or why there is none."""
    return headline(study)


def diff(old: str, new: str) -> Text:
    """`new` with its added words underlined and the removed words of `old` struck through, also in colour."""
    return Text.assemble(*((text, _STYLES[change]) for change, text in word_diff(old, new)))


def _empty(title: str, caption: str) -> Rich:
    return Rich(
        title=title,
        caption=caption,
        title_justify="left",
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        collapse_padding=True,
        pad_edge=False,
    )


def _folded(whole: Rich) -> Group:
    """What a table says, row by row: its first cell, and a line for each other one."""
    heads = [_in_line(str(column.header)) for column in whole.columns]
    parts: list[Text | Rich] = [Text(str(whole.title), style="italic")]
    for first, *cells in zip(*(column.cells for column in whole.columns), strict=True):
        lines = Rich.grid(padding=(0, 2, 0, 0))
        for head, cell in zip(heads[1:], cells, strict=True):
            if str(cell):
                lines.add_row(head, _in_line(cell))
        for column in lines.columns:
            column.overflow = "fold"
        parts += [Text("\n") + _in_line(first, "bold"), lines]
    return Group(*parts, Text(f"\n{whole.caption or ''}", style="dim italic"))


def _in_line(cell: object, style: str = "") -> Text:
    """A cell of several lines as one."""
    text = cell if isinstance(cell, Text) else Text(str(cell))
    joined = Text(", ").join(text.split("\n"))
    joined.stylize(style)
    return joined


def _cell(cell: Cell) -> Text:
    text = cell.text if cell.kind != "path" else cell.text.replace("r", "✓").replace("w", "✗")
    return Text(f"{text}\n{cell.range}" if cell.range else text, style=_TONES[cell.tone])


def _accuracy(row: TurnRow | None) -> Text:
    if row is None or row.mean_score is None:
        return Text("–")
    low, high = f"{100 * row.low:.1f}", f"{100 * row.high:.1f}".replace("100.0", "100")
    return _over(f"{100 * row.accuracy:.1f}", f"{low}–{high}")


def _change(measured: Measurement) -> tuple[Text | str, str, str]:
    gain, flips = measured.gain, measured.flips
    if gain is None or flips is None:
        return "–", "–", "–"
    copied = measured.turns[-1].copied
    same = "–" if copied is None else f"{100 * copied:.0f}%"
    return _gain(gain), f"{flips.wrong_to_right}\n{flips.right_to_wrong}", same


def _gain(gain: Gain) -> Text:
    return _over(signed(gain.points), between(gain), _TONES[tone(gain)])


def _over(number: str, interval: str, style: str = "") -> Text:
    return Text.assemble(number, "\n", (interval, "dim"), style=style)
