"""The drafts on the page: a balanced choice of attempts, each draft with its changes against the one it was shown.

A critique stands above the answer that followed it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain, zip_longest
from math import isnan

from markupsafe import Markup, escape

from upturn.evaluation import values
from upturn.report.diff import word_diff
from upturn.report.tables import DASH, Cell, Table, columns, head, without_empty
from upturn.types import Attempt, Draft, Score

KINDS = {
    "fixed": "wrong → right",
    "broken": "right → wrong",
    "kept": "stayed right",
    "missed": "stayed wrong",
}
"""Kinds of attempt by the answers of its first and last turn, and their names on the page."""
MOST = 60
"""At most so many attempts of each model."""
BYTES = 2_500_000
"""Of all drafts together, as HTML; every model has the same part of it."""
LONGEST = 3_000
"""Characters of one draft, and of one critique; more are cut, and the page says so."""

_TAGS = {"added": "<ins>{}</ins>", "removed": "<del>{}</del>", "same": "{}", "gap": "{}"}
_VISIBLE = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"} | {0x7F: 0x2421}
_VISIBLE |= dict.fromkeys(range(0xD800, 0xE000), 0xFFFD)
"""Control characters as their pictures; halves of surrogate pairs, which no file can hold, as the usual mark."""


@dataclass(frozen=True, slots=True)
class ShownDraft:
    """One draft."""

    turn: int
    right: bool | None
    """None where it was not judged."""
    about: tuple[str, ...]
    """Score, note, and what else is to be said in a few words."""
    html: Markup
    cut: int
    """Characters left out."""
    critique: Markup
    """What it was to follow; empty where there was no critique, as with an answer that had been kept before."""
    critique_cut: int

    @property
    def size(self) -> int:
        """Bytes on the page, about."""
        return len(self.html.encode()) + len(self.critique.encode()) + 500


@dataclass(frozen=True, slots=True)
class Shown:
    """One attempt."""

    label: str
    """Which model."""
    id: str
    task: str
    kind: str
    """'' where the answer of its first or last turn could not be judged."""
    path: str
    """A letter per draft: r right, w wrong, n not judged."""
    prompt: str
    drafts: tuple[ShownDraft, ...]

    @property
    def size(self) -> int:
        """Bytes on the page, about."""
        return len(self.prompt.encode()) + sum(draft.size for draft in self.drafts) + 700


@dataclass(frozen=True, slots=True)
class Shelf:
    """All that the page shows of the drafts."""

    shown: tuple[Shown, ...]
    tally: Table
    """How many of how many, by model and kind."""

    @property
    def labels(self) -> list[str]:
        """Models, the last one first."""
        return list(dict.fromkeys(attempt.label for attempt in self.shown))

    @property
    def tasks(self) -> list[str]:
        """Tasks."""
        return sorted({attempt.task for attempt in self.shown})

    @property
    def judged(self) -> bool:
        """Whether any attempt has a kind."""
        return any(attempt.kind for attempt in self.shown)

    @property
    def critiques(self) -> bool:
        """Whether any draft followed a critique."""
        return any(draft.critique for attempt in self.shown for draft in attempt.drafts)

    @property
    def paths(self) -> list[tuple[str, int]]:
        """Paths and how many attempts on the page went that way, the most frequent first."""
        return Counter(attempt.path for attempt in self.shown).most_common()


def shelf(answers: Sequence[tuple[str, Sequence[Attempt]]], task: str) -> Shelf:
    """A choice for every model, the last model first. `answers`: (label, its attempts)."""
    found, rows = [], []
    for label, attempts in reversed(answers):
        whole = [attempt for attempt in attempts if attempt.drafts]
        each = (_show(attempt, label, task) for attempt in balanced(whole))
        shown = list(_within(BYTES // len(answers), each))
        found += shown
        rows.append((head(label), *_tally(Counter(map(kind_of, whole)), Counter(attempt.kind for attempt in shown))))
    heads = columns("model", *KINDS.values(), "all")
    return Shelf(tuple(found), without_empty(Table("On this page, of all in the run", heads, tuple(rows))))


def _tally(whole: Counter[str], shown: Counter[str]) -> list[Cell]:
    judged = any(kind in whole for kind in KINDS)
    cells = [Cell(f"{shown[kind]} of {whole[kind]:,}") if judged else DASH for kind in KINDS]
    return [*cells, Cell(f"{shown.total()} of {whole.total():,}")]


def balanced(attempts: Iterable[Attempt]) -> list[Attempt]:
    """At most MOST, the kinds taking turns; what one kind lacks, the others fill."""
    by_kind: dict[str, list[Attempt]] = {kind: [] for kind in (*KINDS, "")}
    for attempt in attempts:
        by_kind[kind_of(attempt)].append(attempt)
    chosen = {kind: _spread(found, MOST // len(KINDS) if kind else 0) for kind, found in by_kind.items()}
    for kind, found in by_kind.items():
        free = MOST - sum(map(len, chosen.values()))
        chosen[kind] = _spread(found, len(chosen[kind]) + free)
    return [attempt for attempt in chain.from_iterable(zip_longest(*chosen.values())) if attempt]


def kind_of(attempt: Attempt) -> str:
    """'fixed', 'broken', 'kept' or 'missed'; '' where one of the two answers could not be judged."""
    kinds: dict[tuple[float, float], str]
    kinds = {(0, 1): "fixed", (1, 0): "broken", (1, 1): "kept", (0, 0): "missed"}
    return kinds.get((values.first_right(attempt), values.last_right(attempt)), "")


def _spread(attempts: Sequence[Attempt], want: int) -> list[Attempt]:
    """`want` of them, evenly spread over their order: nobody picks the nice ones."""
    count = min(want, len(attempts))
    return [attempts[place * len(attempts) // count] for place in range(count)]


def _within(size: int, shown: Iterable[Shown]) -> Iterable[Shown]:
    """The first ones that fit; one always does."""
    for place, attempt in enumerate(shown):
        size -= attempt.size
        if size < 0 and place:
            return
        yield attempt


def _show(attempt: Attempt, label: str, task: str) -> Shown:
    drafts = tuple(_draft(attempt, *pair) for pair in zip(attempt.drafts, attempt.scores, strict=True))
    path = "".join({True: "r", False: "w", None: "n"}[draft.right] for draft in drafts)
    prompt = visible(attempt.prompt.text)
    return Shown(label, visible(attempt.prompt.id), task, kind_of(attempt), path, prompt, drafts)


def _draft(attempt: Attempt, draft: Draft, score: Score) -> ShownDraft:
    text, critique = draft.text[:LONGEST], draft.critique[:LONGEST]
    parent = attempt.drafts[draft.parents[-1]].text if draft.parents else None
    pieces = word_diff(text if parent is None else parent[:LONGEST], text)
    html = Markup("").join(Markup(_TAGS[change]).format(escape(visible(piece))) for change, piece in pieces)
    unknown = isnan(score.value)
    about = (
        "" if unknown else f"score {score.value:.3g}",
        visible(score.note),
        _unchanged(draft) if draft.text == parent else "",
        "" if draft.complete else "cut short",
        f"{draft.num_tokens:,} tokens{' with the critique' if draft.critique else ''}",
    )
    return ShownDraft(
        turn=draft.turn,
        right=None if unknown else score.right,
        about=tuple(filter(None, about)),
        html=html,
        cut=len(draft.text) - len(text),
        critique=escape(visible(critique)),
        critique_cut=len(draft.critique) - len(critique),
    )


def _unchanged(draft: Draft) -> str:
    """A critique found nothing to change and the model was not asked again, or it wrote the same once more."""
    return "kept" if draft.kept else "unchanged"


def visible(text: str) -> str:
    """The text with something to see for what has no picture; line breaks and tabs stay."""
    return text.translate(_VISIBLE)
