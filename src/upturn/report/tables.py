"""Tables as data: what stands in every cell, for the page and the terminal alike."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from upturn.evaluation.stats import Estimate
from upturn.evaluation.turns import Gain, TurnRow
from upturn.report.formats import Tone, between, listing, p_value, percent, signed, tone

Kind = Literal["", "path", "words", "head"]


@dataclass(frozen=True, slots=True)
class Cell:
    """One cell."""

    text: str
    range: str = ""
    """The interval, or what stands small under the text."""
    tone: Tone = ""
    kind: Kind = ""
    """path: a letter per turn, shown as marks. words: running text. head: names the row."""
    bar: float | None = None
    """Length of a bar behind the number, 0 to 1."""
    about: str = ""
    """n, and how the interval was made."""


@dataclass(frozen=True, slots=True)
class Column:
    """A column's head."""

    head: str
    unit: str = ""
    kind: Literal["number", "words", "bar"] = "number"


@dataclass(frozen=True, slots=True)
class Table:
    """A table with a name, and what its numbers rest on."""

    title: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[Cell, ...], ...]
    note: str = ""
    strong: frozenset[int] = field(default_factory=frozenset)
    """Rows that stand out."""


DASH = Cell("–")


def head(text: str) -> Cell:
    """The cell that names its row."""
    return Cell(text, kind="head")


def words(text: str) -> Cell:
    """Running text."""
    return Cell(text, kind="words")


def count(number: float | None) -> Cell:
    """'1,234'."""
    return DASH if number is None else Cell(f"{number:,.0f}")


def decimal(number: float | None, digits: int = 3) -> Cell:
    """'0.123'."""
    return DASH if number is None else Cell(f"{number:.{digits}f}".replace("-", "−"))


def tokens(mean: float | None) -> Cell:
    """'12.3', a mean number of tokens; a dash for 0, which is what an endpoint tells that does not count them."""
    return decimal(mean or None, 1)


def share(value: float | None) -> Cell:
    """A share without an interval."""
    return DASH if value is None else Cell(percent(value))


def estimated(estimate: Estimate | None) -> Cell:
    """A share with its interval."""
    if estimate is None:
        return DASH
    return Cell(percent(estimate.value), between(estimate, 100), about=basis(estimate))


def difference(estimate: Estimate | None) -> Cell:
    """A difference of shares with its interval, in points."""
    if estimate is None:
        return DASH
    return Cell(signed(100 * estimate.value), between(estimate, 100), tone(estimate), about=basis(estimate))


def gained(gain: Gain | None) -> Cell:
    """A gain with its interval, in points."""
    if gain is None:
        return DASH
    about = f"n = {gain.n:,}, bootstrap over prompts"
    return Cell(signed(gain.points), between(gain), tone(gain), about=about)


def turn(row: TurnRow | None) -> Cell:
    """The accuracy of a turn; a dash where none of its answers could be judged."""
    if row is None or row.mean_score is None:
        return DASH
    return Cell(percent(row.accuracy), between(row, 100), about=f"n = {_n(row):,}, Wilson")


def p(value: float, *, at_most: bool = False) -> Cell:
    """A p-value."""
    return Cell(p_value(value, at_most=at_most))


def basis(estimate: Estimate) -> str:
    """'n = 500, Wilson'."""
    return f"n = {estimate.n:,}, {estimate.how}"


def rests_on(estimates: Iterable[Estimate | Gain | TurnRow | None]) -> str:
    """'n = 500 prompts. 95% intervals: Wilson, bootstrap over prompts.': what the numbers of a table rest on."""
    known = [estimate for estimate in estimates if estimate is not None]
    if not known:
        return ""
    counts = sorted(set(map(_n, known)))
    told = f"{counts[0]:,}" if len(counts) == 1 else f"{counts[0]:,} to {counts[-1]:,}"
    ways = listing(list(dict.fromkeys(map(_how, known))))
    return f"n = {told} prompts. 95% intervals: {ways}."


def _n(estimate: Estimate | Gain | TurnRow) -> int:
    """Prompts; of a turn those that could be judged."""
    return estimate.n - estimate.unjudged if isinstance(estimate, TurnRow) else estimate.n


def _how(estimate: Estimate | Gain | TurnRow) -> str:
    match estimate:
        case Estimate():
            return estimate.how
        case Gain():
            return "bootstrap over prompts"
        case TurnRow():
            return "Wilson"


def columns(*heads: str | Column) -> tuple[Column, ...]:
    """Columns from heads like 'tokens | per prompt'."""
    return tuple(head if isinstance(head, Column) else _column(head) for head in heads)


def _column(text: str) -> Column:
    name, _, unit = text.partition(" | ")
    return Column(name, unit)


def with_bars(cells: Sequence[Cell], values: Sequence[float]) -> list[Cell]:
    """The cells with bars, the longest for the largest value."""
    most = max(values, default=0) or 1
    return [replace(cell, bar=value / most) for cell, value in zip(cells, values, strict=True)]


def without_empty(table: Table) -> Table:
    """The table without the columns that hold nothing."""
    kept = [place for place in range(len(table.columns)) if any(row[place] is not DASH for row in table.rows)]
    rows = tuple(tuple(row[place] for place in kept) for row in table.rows)
    return Table(table.title, tuple(table.columns[place] for place in kept), rows, table.note, table.strong)
