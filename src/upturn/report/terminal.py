"""A run in the terminal: the turn table and coloured diffs."""

from __future__ import annotations

from rich import box
from rich.table import Table
from rich.text import Text

from upturn.evaluation.summary import Measurement, Summary
from upturn.evaluation.turns import Gain, TurnRow
from upturn.report.diff import word_diff
from upturn.report.verdict import direction, interval, signed, verdict

__all__ = ["diff", "turn_table", "verdict"]

_COLOURS = {"better": "green", "worse": "red", "unclear": ""}
_STYLES = {"same": "", "gap": "", "added": "underline green", "removed": "strike red"}


def turn_table(summary: Summary) -> Table:
    """One row per measured model: accuracy per turn in percent, and what the last turn adds to the first."""
    turns = sorted({row.turn for measured in summary.measurements for row in measured.turns})
    table = Table(
        title=f"{summary.name}: right answers in %, with 95% intervals",
        caption="gain: last turn against first, in points · w→r: from wrong to right, r→w: the reverse"
        " · same: last turn repeats the draft it was shown",
        title_justify="left",
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        collapse_padding=True,
        pad_edge=False,
    )
    table.add_column("", style="bold", no_wrap=True)
    for header in (*(f"turn {turn}" for turn in turns), "gain", "w→r", "r→w", "same"):
        table.add_column(header, justify="right", no_wrap=True)
    for measured in summary.measurements:
        rows = {row.turn: row for row in measured.turns}
        table.add_row(measured.label, *(_accuracy(rows.get(turn)) for turn in turns), *_change(measured))
    return table


def diff(old: str, new: str) -> Text:
    """`new` with its added words underlined and the removed words of `old` struck through, also in colour."""
    return Text.assemble(*((text, _STYLES[change]) for change, text in word_diff(old, new)))


def _accuracy(row: TurnRow | None) -> str:
    return f"{100 * row.accuracy:.1f}\n±{50 * (row.high - row.low):.1f}" if row else "–"


def _change(measured: Measurement) -> tuple[Text | str, str, str, str]:
    gain, flips = measured.gain, measured.flips
    if gain is None or flips is None:
        return "–", "–", "–", "–"
    copied = measured.turns[-1].copied
    same = "–" if copied is None else f"{100 * copied:.0f}%"
    return _gain(gain), str(flips.wrong_to_right), str(flips.right_to_wrong), same


def _gain(gain: Gain) -> Text:
    return Text(f"{signed(gain.points)}\n{interval(gain)}", style=_COLOURS[direction(gain)])
