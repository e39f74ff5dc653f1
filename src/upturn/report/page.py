"""One self-contained page of a run: `report.html`.

Reads `summary.json`, `config.yaml` and `drafts/<label>.jsonl` of a run folder. The page needs no network, no
script and no fonts; the same folder gives the same bytes.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, zip_longest
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from upturn.errors import RunError
from upturn.evaluation.summary import Measurement, Summary, drafts_file
from upturn.report import figures, verdict
from upturn.report.diff import Change, word_diff
from upturn.types import Attempt, Draft, Score, attempt_from_json

KINDS = {
    "fixed": ("wrong → right", 10),
    "broken": ("right → wrong", 10),
    "kept": ("stayed right", 5),
    "missed": ("stayed wrong", 5),
}
"""Kinds of sample by first and last draft: name on the page, and how many are wanted of each."""
NUM_SAMPLES = 30
"""At most so many samples for each model."""
TEXT_BUDGET = 500_000
"""Characters of drafts on the whole page; the last model takes its samples first."""
LONGEST_DRAFT = 3_000
"""Characters of one draft; more are cut, and the page says so."""


@dataclass(frozen=True, slots=True)
class ShownDraft:
    """A draft with its changes against the last draft it was shown."""

    draft: Draft
    score: Score
    pieces: list[tuple[Change, str]]
    cut: int
    """Characters left out."""
    copied: bool


@dataclass(frozen=True, slots=True)
class Sample:
    """One attempt on the page."""

    attempt: Attempt
    kind: str
    drafts: list[ShownDraft]


def write_page(run_dir: Path) -> Path:
    """Write `report.html` into a run folder, by rename, and return its path."""
    summary = Summary.read(run_dir / "summary.json")
    flips = [measured.flips for measured in summary.measurements if measured.flips]
    config = run_dir / "config.yaml"
    text = (
        _environment()
        .get_template("page.html.jinja")
        .render(
            summary=summary,
            headline=verdict.headline(summary),
            details=verdict.details(summary),
            figures=_figures(summary.measurements),
            samples=_samples(run_dir, summary.measurements),
            turns=sorted({row.turn for measured in summary.measurements for row in measured.turns}),
            widest=max((max(f.wrong_to_right, f.right_to_wrong) for f in flips), default=None),
            kinds={kind: name for kind, (name, _) in KINDS.items()},
            config=config.read_text(encoding="utf-8") if config.exists() else "",
        )
    )
    page = run_dir / "report.html"
    draft = page.with_name(f".{page.name}.{os.getpid()}")
    draft.write_text(text, encoding="utf-8")
    draft.replace(page)
    return page


def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "percent": verdict.percent,
        "signed": verdict.signed,
        "interval": verdict.interval,
        "direction": verdict.direction,
        "duration": duration,
        "p_value": p_value,
    }
    environment.globals["series"] = figures.series
    return environment


def duration(seconds: float) -> str:
    """'3.2 s', '5 min 12 s', '2 h 05 min'."""
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def p_value(p: float) -> str:
    """'0.031'; below 0.001 as a power of ten."""
    if p >= 0.001:
        return f"{p:.3f}"
    digits, exponent = f"{p:.0e}".split("e")
    return f"{digits}·10⁻{str(-int(exponent)).translate(str.maketrans('0123456789', '⁰¹²³⁴⁵⁶⁷⁸⁹'))}"


def _figures(measurements: Sequence[Measurement]) -> dict[str, list[tuple[str, Markup]]]:
    """By figure: (which screens, drawing), once wide and once for a phone."""
    drawn = {}
    if measured := [m for m in measurements if len(m.turns) > 1]:
        drawn["turns"] = [
            ("wide", Markup(figures.turn_curves(measured, 960, 420, "turns-wide"))),
            ("narrow", Markup(figures.turn_curves(measured, 358, 360, "turns-narrow"))),
        ]
    if voted := [m for m in measurements if m.majority and m.turns][-1:]:
        drawn["tokens"] = [
            ("wide", Markup(figures.token_curves(voted, 960, 320, "tokens-wide"))),
            ("narrow", Markup(figures.token_curves(voted, 358, 320, "tokens-narrow"))),
        ]
    return drawn


def _samples(run_dir: Path, measurements: Sequence[Measurement]) -> list[tuple[Measurement, list[Sample]]]:
    """Samples of each model, the last model first, until the page is long enough."""
    left, chosen = TEXT_BUDGET, []
    for measured in reversed(measurements):
        shown = []
        for attempt, kind in _balanced(_attempts(run_dir / drafts_file(measured.label))):
            sample = _sample(attempt, kind)
            left -= sum(len(text) for draft in sample.drafts for _, text in draft.pieces)
            if left < 0:
                break
            shown.append(sample)
        if shown:
            chosen.append((measured, shown))
    return chosen


def _attempts(path: Path) -> Iterator[Attempt]:
    """Scored attempts of a file; a measurement without a file has none to show."""
    if not path.exists():
        return
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            try:
                yield attempt_from_json(json.loads(line))
            except (ValueError, TypeError, KeyError) as error:
                mend = "Run the same command again: it writes the file anew."
                raise RunError(f"{path}, line {number}", "This is not a scored attempt.", mend) from error


def _balanced(attempts: Iterable[Attempt]) -> list[tuple[Attempt, str]]:
    """At most NUM_SAMPLES, the kinds taking turns; what one kind lacks, the others fill."""
    by_kind: dict[str, list[Attempt]] = {kind: [] for kind in KINDS}
    for attempt in attempts:
        if attempt.drafts:
            by_kind[_kind(attempt)].append(attempt)
    wanted = {kind: _spread(by_kind[kind], want) for kind, (_, want) in KINDS.items()}
    for kind in KINDS:
        free = NUM_SAMPLES - sum(len(found) for found in wanted.values())
        wanted[kind] = _spread(by_kind[kind], len(wanted[kind]) + free)
    rows = zip_longest(*([(attempt, kind) for attempt in found] for kind, found in wanted.items()))
    return [sample for sample in chain.from_iterable(rows) if sample]


def _kind(attempt: Attempt) -> str:
    first, last = attempt.scores[0].right, attempt.scores[-1].right
    return {(False, True): "fixed", (True, False): "broken", (True, True): "kept"}.get((first, last), "missed")


def _spread(attempts: Sequence[Attempt], want: int) -> list[Attempt]:
    """`want` of them, evenly spread over their order: nobody picks the nice ones."""
    count = min(want, len(attempts))
    return [attempts[place * len(attempts) // count] for place in range(count)]


def _sample(attempt: Attempt, kind: str) -> Sample:
    pairs = zip(attempt.drafts, attempt.scores, strict=True)
    return Sample(attempt, kind, [_shown(attempt, draft, score) for draft, score in pairs])


def _shown(attempt: Attempt, draft: Draft, score: Score) -> ShownDraft:
    text = draft.text[:LONGEST_DRAFT]
    parent = attempt.drafts[draft.parents[-1]].text if draft.parents else None
    pieces = word_diff(text if parent is None else parent[:LONGEST_DRAFT], text)
    return ShownDraft(draft, score, pieces, len(draft.text) - len(text), draft.text == parent)
